variable "project" {
  description = "Project that everything is made in."
  type        = string
}

variable "region" {
  description = "Region of bucket and cluster: both in one, or reading costs egress."
  type        = string
}

variable "zones" {
  description = "Zones of the region that have the GPUs; empty lets GKE choose."
  type        = list(string)
  default     = []
}

variable "bucket" {
  description = "Name of the bucket, unique in all of Google Cloud."
  type        = string
}

variable "waves" {
  description = "Prefixes that are deleted after some days: datasets that are made, used and made again, such as one layer group of a release after another."
  type        = map(number)
  default     = {}

  validation {
    condition     = alltrue([for prefix, days in var.waves : length(prefix) > 0 && days >= 1])
    error_message = "Each wave needs a prefix, such as \"waves/\", and at least one day: an empty prefix would be the whole bucket."
  }
}

variable "readers" {
  description = "Who may read datasets and nothing else, e.g. [\"group:interp@example.org\"]. Public principals are refused."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for who in var.readers : can(regex("^(user|group|serviceAccount|domain|principal|principalSet):", who))])
    error_message = "Readers are user:, group:, serviceAccount:, domain:, principal: or principalSet:; the bucket is never public."
  }
}

variable "namespace" {
  description = "Namespace of infra/kuberay."
  type        = string
  default     = "actlake"
}

variable "admin_ranges" {
  description = "Ranges of addresses that reach the cluster's control plane, e.g. [\"203.0.113.7/32\"]."
  type        = list(string)

  validation {
    condition     = alltrue([for range in var.admin_ranges : can(cidrhost(range, 0)) && !endswith(range, "/0")])
    error_message = "Give ranges such as 203.0.113.7/32; 0.0.0.0/0 would be everyone."
  }
}

variable "gpu_machine" {
  description = "Machine type of GPU nodes."
  type        = string
  default     = "g2-standard-16"
}

variable "gpu" {
  description = "Kind and number of GPUs of such a machine."
  type        = object({ type = string, count = number })
  default     = { type = "nvidia-l4", count = 1 }
}

variable "max_gpu_nodes" {
  description = "GPU nodes at most, in all zones together."
  type        = number
  default     = 8
}

variable "cpu_machine" {
  description = "Machine type of the nodes that tokenise."
  type        = string
  default     = "n2-standard-16"
}

variable "max_cpu_nodes" {
  description = "CPU nodes at most, in all zones together."
  type        = number
  default     = 8
}

variable "ray_launcher" {
  description = "Whether to make the service account of infra/ray/cluster-gcp.yaml: its head starts and stops machines."
  type        = bool
  default     = false
}

variable "deletion_protection" {
  description = "Whether 'terraform destroy' is refused for the cluster."
  type        = bool
  default     = true
}

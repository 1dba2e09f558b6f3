output "bucket" {
  description = "Where datasets go: [dataset] in a job file begins with it."
  value       = "gs://${google_storage_bucket.data.name}"
}

output "image" {
  description = "Name of the image, for docker push and infra/kuberay/overlays/gke."
  value       = "${var.region}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.images.repository_id}/actlake"
}

output "ingest_service_account" {
  description = "Identity of the pods, for infra/kuberay/overlays/gke/service-account.yaml and infra/ray/cluster-gcp.yaml."
  value       = google_service_account.ingest.email
}

output "cluster" {
  description = "Name of the cluster, for gcloud container clusters get-credentials."
  value       = google_container_cluster.main.name
}

output "subnetwork" {
  description = "For infra/ray/cluster-gcp.yaml."
  value       = google_compute_subnetwork.main.id
}

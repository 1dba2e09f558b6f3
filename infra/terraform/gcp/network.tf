resource "google_project_service" "apis" {
  for_each = toset([
    "artifactregistry.googleapis.com",
    "cloudresourcemanager.googleapis.com",
    "compute.googleapis.com",
    "container.googleapis.com",
    "iam.googleapis.com",
    "iamcredentials.googleapis.com",
    "storage.googleapis.com",
  ])
  service            = each.value
  disable_on_destroy = false
}

resource "google_compute_network" "main" {
  name                    = "actlake"
  auto_create_subnetworks = false

  depends_on = [google_project_service.apis]
}

# Machines have no public addresses; they reach the bucket inside of Google's network, and hubs of models through NAT.
resource "google_compute_subnetwork" "main" {
  name                     = "actlake"
  network                  = google_compute_network.main.id
  region                   = var.region
  ip_cidr_range            = "10.10.0.0/20"
  private_ip_google_access = true

  secondary_ip_range {
    range_name    = "pods"
    ip_cidr_range = "10.20.0.0/16"
  }

  secondary_ip_range {
    range_name    = "services"
    ip_cidr_range = "10.30.0.0/20"
  }
}

resource "google_compute_router" "main" {
  name    = "actlake"
  network = google_compute_network.main.id
  region  = var.region
}

resource "google_compute_router_nat" "main" {
  name                               = "actlake"
  router                             = google_compute_router.main.name
  region                             = var.region
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "ALL_SUBNETWORKS_ALL_IP_RANGES"
}

# For infra/ray/cluster-gcp.yaml: Ray's nodes reach each other, and Google's identity-aware proxy their ssh.
resource "google_compute_firewall" "ray" {
  count         = var.ray_launcher ? 1 : 0
  name          = "actlake-ray"
  network       = google_compute_network.main.name
  source_ranges = [google_compute_subnetwork.main.ip_cidr_range]

  allow {
    protocol = "tcp"
  }
}

resource "google_compute_firewall" "ssh" {
  count         = var.ray_launcher ? 1 : 0
  name          = "actlake-ssh"
  network       = google_compute_network.main.name
  source_ranges = ["35.235.240.0/20"]

  allow {
    protocol = "tcp"
    ports    = ["22"]
  }
}

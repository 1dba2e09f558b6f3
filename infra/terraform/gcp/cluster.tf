resource "google_artifact_registry_repository" "images" {
  repository_id = "actlake"
  location      = var.region
  format        = "DOCKER"

  depends_on = [google_project_service.apis]
}

resource "google_container_cluster" "main" {
  name                = "actlake"
  location            = var.region
  node_locations      = length(var.zones) > 0 ? var.zones : null
  network             = google_compute_network.main.id
  subnetwork          = google_compute_subnetwork.main.id
  deletion_protection = var.deletion_protection

  # The pools below replace it.
  remove_default_node_pool = true
  initial_node_count       = 1

  # WireGuard between nodes: Ray's own traffic is not encrypted.
  datapath_provider            = "ADVANCED_DATAPATH"
  in_transit_encryption_config = "IN_TRANSIT_ENCRYPTION_INTER_NODE_TRANSPARENT"

  node_config {
    service_account = google_service_account.nodes.email
  }

  release_channel {
    channel = "REGULAR"
  }

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }

  private_cluster_config {
    enable_private_nodes = true
  }

  master_authorized_networks_config {
    dynamic "cidr_blocks" {
      for_each = var.admin_ranges
      content {
        cidr_block = cidr_blocks.value
      }
    }
  }

  workload_identity_config {
    workload_pool = "${var.project}.svc.id.goog"
  }
}

locals {
  pools = {
    # The heads of Ray clusters and KubeRay's operator: on demand, for a head that is lost takes its job along.
    system = { machine = "e2-standard-8", spot = false, least = 1, most = 3, gpus = [] }
    cpu    = { machine = var.cpu_machine, spot = true, least = 0, most = var.max_cpu_nodes, gpus = [] }
    gpu    = { machine = var.gpu_machine, spot = true, least = 0, most = var.max_gpu_nodes, gpus = [var.gpu] }
  }
}

resource "google_container_node_pool" "pools" {
  for_each = local.pools

  # infra/kuberay/overlays/gke selects nodes by these names.
  name               = "actlake-${each.key}"
  cluster            = google_container_cluster.main.id
  initial_node_count = each.key == "system" ? 1 : 0

  autoscaling {
    total_min_node_count = each.value.least
    total_max_node_count = each.value.most
    location_policy      = "ANY"
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = each.value.machine
    spot            = each.value.spot
    service_account = google_service_account.nodes.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    disk_type       = "pd-balanced"
    disk_size_gb    = 200

    dynamic "guest_accelerator" {
      for_each = each.value.gpus
      content {
        type  = guest_accelerator.value.type
        count = guest_accelerator.value.count

        gpu_driver_installation_config {
          gpu_driver_version = "LATEST"
        }
      }
    }

    dynamic "taint" {
      for_each = each.value.spot ? ["actlake/spot"] : []
      content {
        key    = taint.value
        value  = "true"
        effect = "NO_SCHEDULE"
      }
    }

    gvnic {
      enabled = true
    }

    # Pods never see the node's own identity.
    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
  }

  lifecycle {
    # Changed by the autoscaler.
    ignore_changes = [initial_node_count]
  }
}

resource "google_storage_bucket" "data" {
  name     = var.bucket
  location = var.region

  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  # Never deleted with data in it.
  force_destroy = false

  # Folders are real: listing commits/<group>/ costs its own entries, and the starting request rate is 8 times higher.
  hierarchical_namespace {
    enabled = true
  }

  # Soft delete would bill each replaced or deleted shard for 7 more days. Datasets can be built again; a bucket that
  # holds what cannot should keep it on.
  soft_delete_policy {
    retention_duration_seconds = 0
  }

  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }
    condition {
      age = 1
    }
  }

  dynamic "lifecycle_rule" {
    for_each = var.waves
    content {
      action {
        type = "Delete"
      }
      condition {
        age            = lifecycle_rule.value
        matches_prefix = [lifecycle_rule.key]
      }
    }
  }

  depends_on = [google_project_service.apis]
}

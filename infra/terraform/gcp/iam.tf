# The least that each part needs. Roles on data are granted on the bucket, never on the project; nobody has keys.

# What ingestion is: reads, writes and deletes objects of this bucket. It cannot change access to it.
resource "google_service_account" "ingest" {
  account_id   = "actlake-ingest"
  display_name = "actlake ingestion"

  depends_on = [google_project_service.apis]
}

resource "google_storage_bucket_iam_member" "ingest" {
  bucket = google_storage_bucket.data.name
  role   = "roles/storage.objectUser"
  member = google_service_account.ingest.member
}

# Trainers only stream.
resource "google_storage_bucket_iam_member" "readers" {
  for_each = toset(var.readers)
  bucket   = google_storage_bucket.data.name
  role     = "roles/storage.objectViewer"
  member   = each.value
}

# Workload identity: the pods' service account is the ingestion's, without a key.
resource "google_service_account_iam_member" "pods" {
  service_account_id = google_service_account.ingest.name
  role               = "roles/iam.workloadIdentityUser"
  member             = "serviceAccount:${var.project}.svc.id.goog[${var.namespace}/actlake]"

  depends_on = [google_container_cluster.main]
}

# What the nodes themselves are: they send logs and metrics, and pull the image.
resource "google_service_account" "nodes" {
  account_id   = "actlake-nodes"
  display_name = "actlake GKE nodes"

  depends_on = [google_project_service.apis]
}

resource "google_project_iam_member" "nodes" {
  project = var.project
  role    = "roles/container.defaultNodeServiceAccount"
  member  = google_service_account.nodes.member
}

resource "google_artifact_registry_repository_iam_member" "nodes" {
  location   = google_artifact_registry_repository.images.location
  repository = google_artifact_registry_repository.images.name
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.nodes.member
}

# Without Kubernetes: the head of a Ray cluster on plain machines starts and stops those machines.
resource "google_project_iam_custom_role" "launcher" {
  count       = var.ray_launcher ? 1 : 0
  role_id     = "actlakeRayLauncher"
  title       = "actlake Ray launcher"
  description = "Starts, labels and deletes machines; sees no data."
  permissions = [
    "compute.disks.create",
    "compute.images.useReadOnly",
    "compute.instances.create",
    "compute.instances.delete",
    "compute.instances.get",
    "compute.instances.list",
    "compute.instances.setLabels",
    "compute.instances.setMetadata",
    "compute.instances.setServiceAccount",
    "compute.machineTypes.get",
    "compute.projects.get",
    "compute.subnetworks.use",
    "compute.zoneOperations.get",
    "compute.zones.get",
  ]

  depends_on = [google_project_service.apis]
}

resource "google_project_iam_member" "launcher" {
  count   = var.ray_launcher ? 1 : 0
  project = var.project
  role    = google_project_iam_custom_role.launcher[0].id
  member  = google_service_account.ingest.member
}

# It may give the machines that it starts this one identity, its own.
resource "google_service_account_iam_member" "launcher" {
  count              = var.ray_launcher ? 1 : 0
  service_account_id = google_service_account.ingest.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.ingest.member
}

# The image's registry, for machines outside of GKE.
resource "google_artifact_registry_repository_iam_member" "ingest" {
  count      = var.ray_launcher ? 1 : 0
  location   = google_artifact_registry_repository.images.location
  repository = google_artifact_registry_repository.images.name
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.ingest.member
}

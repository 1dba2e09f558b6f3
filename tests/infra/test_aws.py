"""The S3 policies give what the Google roles give: objects of one bucket, over TLS, and no right to change access."""

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "infra/aws"
BUCKET = "arn:aws:s3:::YOUR-BUCKET"

_OBJECTS = {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"}
_FOLDERS = {"s3:ListBucket", "s3:ListBucketMultipartUploads"}


def load(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return value


def many(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def problems(policy: dict[str, Any], *, of_bucket: bool) -> list[str]:
    """What a policy allows that it must not, and lacks that it must have."""
    found = []
    for statement in policy["Statement"]:
        name, actions, resources = statement["Sid"], many(statement["Action"]), many(statement["Resource"])
        if not set(resources) <= {BUCKET, f"{BUCKET}/*"}:
            found.append(f"{name}: other resources than the bucket")
        if statement["Effect"] == "Deny":
            continue
        if "*" in json.dumps(statement.get("Principal", "")):
            found.append(f"{name}: everyone is allowed")
        if not set(actions) <= (_OBJECTS if resources == [f"{BUCKET}/*"] else _FOLDERS):
            found.append(f"{name}: allows {', '.join(actions)} on {', '.join(resources)}")
    if of_bucket and not any(denies_plain(statement) for statement in policy["Statement"]):
        found.append("plain HTTP is allowed")
    return found


def denies_plain(statement: dict[str, Any]) -> bool:
    return (statement["Effect"], statement["Action"], statement.get("Principal"), set(many(statement["Resource"]))) == (
        "Deny",
        "s3:*",
        "*",
        {BUCKET, f"{BUCKET}/*"},
    ) and statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_the_policies_keep_their_promises() -> None:
    assert problems(load("bucket-policy.json"), of_bucket=True) == []
    assert problems(load("ingest-role-policy.json"), of_bucket=False) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"s3:PutObject"', '"s3:PutObjectAcl"', "IngestObjects: allows"),
        ('"s3:PutObject"', '"s3:*"', "IngestObjects: allows"),
        ('{"AWS": "arn:aws:iam::111122223333:role/actlake-read"}', '"*"', "everyone is allowed"),
        ('{"AWS": "arn:aws:iam::111122223333:role/actlake-read"}', '{"AWS": "*"}', "everyone is allowed"),
        ('"aws:SecureTransport": "false"', '"aws:SecureTransport": "true"', "plain HTTP"),
        ('"Deny"', '"Allow"', "plain HTTP"),
        ('"arn:aws:s3:::YOUR-BUCKET/*"', '"arn:aws:s3:::*"', "other resources"),
    ],
)
def test_a_policy_that_breaks_one_would_be_found(old: str, new: str, problem: str) -> None:
    text = (FOLDER / "bucket-policy.json").read_text()
    assert old in text
    assert any(problem in line for line in problems(json.loads(text.replace(old, new)), of_bucket=True))


def test_role_and_bucket_give_ingestion_the_same() -> None:
    def granted(name: str) -> dict[str, set[str]]:
        statements = load(name)["Statement"]
        return {s["Sid"]: set(many(s["Action"])) for s in statements if s["Sid"].startswith("Ingest")}

    assert granted("bucket-policy.json") == granted("ingest-role-policy.json")
    assert granted("bucket-policy.json") == {"IngestObjects": _OBJECTS, "IngestBucket": _FOLDERS}


def test_uploads_that_broke_off_are_cleared_and_nothing_is_public() -> None:
    rules = {rule["ID"]: rule for rule in load("lifecycle.json")["Rules"]}
    assert rules["abort-uploads"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert all("Expiration" not in rule or rule["Filter"]["Prefix"] for rule in rules.values())
    assert set(load("public-access-block.json").values()) == {True}

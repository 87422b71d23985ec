"""The schema of KubeRay's RayJob and RayCluster in strict form: what `tests/unit/test_deployment.py` holds the YAML files against.

    python tests/data/kuberay_schema.py DEFINITIONS    # writes kuberay_schema.json beside this file

KubeRay's own types are below: names and types of fields are those of its field reference (docs/reference/api.md, generated from the
Go types that its CRDs are generated from) at release v1.7.0. The types of Kubernetes in them come from DEFINITIONS, Kubernetes'
OpenAPI as JSON schema: `_definitions.json` of v1.30.0-local-strict in the package kubernetes-validate 1.37.0. An older Kubernetes
than KubeRay v1.7.0 embeds, so that nothing is taken for known that a cluster does not know yet. Both are under the Apache licence,
version 2.0. The CRDs themselves repeat the pod template in every place, a megabyte each.

Made strict on the way: unknown fields are refused in every object whose fields are known, and null is nowhere a value (Kubernetes'
API server refuses the first with `fieldValidation: Strict`, which kubectl asks for, and drops the second without a word).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"
COMMENT = (
    "Made by kuberay_schema.py from the field reference of KubeRay v1.7.0 and the JSON schema of Kubernetes v1.30.0; "
    "both under the Apache License, Version 2.0."
)
PREFIX = "#/$defs/"
CORE = "io.k8s.api.core.v1."
NETWORKING = "io.k8s.api.networking.v1."
DROPPED = {"description", "default", "x-kubernetes-group-version-kind"}
WHERE = Path(__file__).with_name("kuberay_schema.json")


def ref(name: str) -> Schema:
    """A type by its name."""
    return {"$ref": PREFIX + name}


def core(name: str) -> Schema:
    """A type of Kubernetes' core API."""
    return ref(CORE + name)


def list_of(item: Schema, **more: Any) -> Schema:
    """A list of one type."""
    return {"type": "array", "items": item, **more}


def one_of(*values: str) -> Schema:
    """One of these texts."""
    return {"type": "string", "enum": list(values)}


def whole(minimum: int | None = None) -> Schema:
    """A whole number."""
    return {"type": "integer"} if minimum is None else {"type": "integer", "minimum": minimum}


TEXT: Schema = {"type": "string"}
YES_NO: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
METADATA = ref("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")

FIELDS: dict[str, dict[str, Schema]] = {
    "RayJob": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": METADATA,
        "spec": ref("RayJobSpec"),
    },
    "RayCluster": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": METADATA,
        "spec": ref("RayClusterSpec"),
    },
    "RayJobSpec": {
        "activeDeadlineSeconds": whole(1),
        "backoffLimit": whole(0),
        "clusterSelector": TEXTS,
        "deletionStrategy": ref("DeletionStrategy"),
        "entrypoint": TEXT,
        "entrypointNumCpus": NUMBER,
        "entrypointNumGpus": NUMBER,
        "entrypointResources": TEXT,
        "jobId": TEXT,
        "managedBy": one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        "metadata": TEXTS,
        "preRunningDeadlineSeconds": whole(1),
        "rayClusterSpec": ref("RayClusterSpec"),
        "runtimeEnvYAML": TEXT,
        "shutdownAfterJobFinishes": YES_NO,
        "submissionMode": one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "submitterConfig": ref("SubmitterConfig"),
        "submitterPodTemplate": core("PodTemplateSpec"),
        "suspend": YES_NO,
        "ttlSecondsAfterFinished": whole(0),
    },
    "RayClusterSpec": {
        "authOptions": ref("AuthOptions"),
        "autoscalerOptions": ref("AutoscalerOptions"),
        "enableInTreeAutoscaling": YES_NO,
        "gcsFaultToleranceOptions": ref("GcsFaultToleranceOptions"),
        "headGroupSpec": ref("HeadGroupSpec"),
        "headServiceAnnotations": TEXTS,
        "historyServerOptions": ref("HistoryServerOptions"),
        "managedBy": one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        "networkPolicy": ref("NetworkPolicyConfig"),
        "rayVersion": TEXT,
        "suspend": YES_NO,
        "tlsOptions": ref("TLSOptions"),
        "upgradeStrategy": ref("RayClusterUpgradeStrategy"),
        "workerGroupSpecs": list_of(ref("WorkerGroupSpec")),
    },
    "HeadGroupSpec": {
        "enableIngress": YES_NO,
        "headService": core("Service"),
        "ingressOptions": ref("IngressOptions"),
        "labels": TEXTS,
        "rayStartParams": TEXTS,
        "resources": TEXTS,
        "serviceType": TEXT,
        "template": core("PodTemplateSpec"),
    },
    "WorkerGroupSpec": {
        "groupName": TEXT,
        "idleTimeoutSeconds": whole(),
        "labels": TEXTS,
        "maxReplicas": whole(0),
        "minReplicas": whole(0),
        "numOfHosts": whole(1),
        "priority": whole(),
        "rayStartParams": TEXTS,
        "replicas": whole(0),
        "resources": TEXTS,
        "scaleStrategy": ref("ScaleStrategy"),
        "suspend": YES_NO,
        "template": core("PodTemplateSpec"),
    },
    "AuthOptions": {"enableK8sTokenAuth": YES_NO, "mode": one_of("disabled", "token"), "secretName": TEXT},
    "AutoscalerOptions": {
        "args": list_of(TEXT),
        "command": list_of(TEXT),
        "env": list_of(core("EnvVar")),
        "envFrom": list_of(core("EnvFromSource")),
        "idleTimeoutSeconds": whole(),
        "image": TEXT,
        "imagePullPolicy": TEXT,
        "resources": core("ResourceRequirements"),
        "securityContext": core("SecurityContext"),
        "upscalingMode": one_of("Default", "Aggressive", "Conservative"),
        "version": one_of("v1", "v2"),
        "volumeMounts": list_of(core("VolumeMount")),
    },
    "CollectorOptions": {
        "env": list_of(core("EnvVar")),
        "image": TEXT,
        "imagePullPolicy": TEXT,
        "resources": core("ResourceRequirements"),
    },
    "DeletionCondition": {"jobDeploymentStatus": TEXT, "jobStatus": TEXT, "ttlSeconds": whole(0)},
    "DeletionPolicy": {"policy": one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")},
    "DeletionRule": {
        "condition": ref("DeletionCondition"),
        "policy": one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
    },
    "DeletionStrategy": {
        "deletionRules": list_of(ref("DeletionRule"), minItems=1),
        "onFailure": ref("DeletionPolicy"),
        "onSuccess": ref("DeletionPolicy"),
    },
    "GcsEmbeddedStorage": {
        "accessModes": list_of(TEXT),
        "claimName": TEXT,
        "deletionPolicy": one_of("DeleteWithCluster", "Retain"),
        "size": ref("io.k8s.apimachinery.pkg.api.resource.Quantity"),
        "storageClassName": TEXT,
        "subPath": TEXT,
    },
    "GcsFaultToleranceOptions": {
        "backend": one_of("redis", "rocksdb"),
        "externalStorageNamespace": TEXT,
        "redisAddress": TEXT,
        "redisPassword": ref("RedisCredential"),
        "redisUsername": ref("RedisCredential"),
        "storage": ref("GcsEmbeddedStorage"),
    },
    "HistoryServerOptions": {"collectorOptions": ref("CollectorOptions")},
    "IngressOptions": {
        "host": TEXT,
        "path": TEXT,
        "pathType": one_of("Exact", "Prefix", "ImplementationSpecific"),
        "tls": list_of(ref(NETWORKING + "IngressTLS")),
    },
    "NetworkPolicyConfig": {
        "head": ref("NetworkPolicyRules"),
        "mode": one_of("DenyAll", "DenyAllIngress", "DenyAllEgress"),
        "worker": ref("NetworkPolicyRules"),
        "workerGroups": list_of(ref("WorkerGroupNetworkPolicyRules")),
    },
    "NetworkPolicyRules": {
        "egressRules": list_of(ref(NETWORKING + "NetworkPolicyEgressRule")),
        "ingressRules": list_of(ref(NETWORKING + "NetworkPolicyIngressRule")),
    },
    "RayClusterUpgradeStrategy": {"type": one_of("Recreate", "None")},
    "RedisCredential": {"value": TEXT, "valueFrom": core("EnvVarSource")},
    "ScaleStrategy": {"workersToDelete": list_of(TEXT)},
    "SubmitterConfig": {"backoffLimit": whole(0)},
    "TLSOptions": {"enabled": YES_NO},
    "WorkerGroupNetworkPolicyRules": {
        "egressRules": list_of(ref(NETWORKING + "NetworkPolicyEgressRule")),
        "groupName": TEXT,
        "ingressRules": list_of(ref(NETWORKING + "NetworkPolicyIngressRule")),
    },
}
REQUIRED: dict[str, list[str]] = {
    "RayJob": ["apiVersion", "kind", "metadata", "spec"],
    "RayCluster": ["apiVersion", "kind", "metadata", "spec"],
    "RayClusterSpec": ["headGroupSpec"],
    "HeadGroupSpec": ["template"],
    "WorkerGroupSpec": ["groupName", "maxReplicas", "minReplicas", "template"],
    "DeletionRule": ["condition", "policy"],
    "WorkerGroupNetworkPolicyRules": ["groupName"],
}
# Further kinds that deployment files hold.
KINDS = [CORE + "ConfigMap"]


def own_types() -> dict[str, Schema]:
    """KubeRay's types as JSON schema."""
    return {
        name: {
            "type": "object",
            "properties": fields,
            "required": REQUIRED.get(name, []),
            "additionalProperties": False,
        }
        for name, fields in FIELDS.items()
    }


def strict(schema: Any) -> Any:
    """A type of Kubernetes without null and without what only people read."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "properties":  # names of fields, of which some are called `description` or `default`
            kept[key] = {name: strict(field) for name, field in value.items()}
        elif key == "type" and isinstance(value, list):
            (kept[key],) = (each for each in value if each != "null")
        elif key not in DROPPED:
            kept[key] = strict(value)
    if "properties" in kept:
        kept["additionalProperties"] = False
    return kept


def named(schema: Any) -> Iterator[str]:
    """The types that a schema refers to."""
    if isinstance(schema, Mapping):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix(PREFIX)
        for value in schema.values():
            yield from named(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from named(value)


def build(kubernetes: Mapping[str, Schema]) -> Schema:
    """The schema: KubeRay's types, and of Kubernetes' those that they need."""
    types = own_types()
    missing = [*named(types), *KINDS]
    while missing:
        name = missing.pop()
        if name not in types:
            types[name] = strict(kubernetes[name])
            missing += named(types[name])
    return {"$schema": DRAFT, "$comment": COMMENT, "$defs": dict(sorted(types.items()))}


def main() -> None:
    """Write the schema, a type a line."""
    schema = build(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["$defs"])
    lines = [f'  "{name}": {json.dumps(body, separators=(",", ":"))}' for name, body in schema["$defs"].items()]
    text = f'{{"$schema": "{DRAFT}",\n "$comment": "{COMMENT}",\n "$defs": {{\n' + ",\n".join(lines) + "\n}}\n"
    assert json.loads(text) == schema
    WHERE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

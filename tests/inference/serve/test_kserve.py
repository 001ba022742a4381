"""The manifest of docs/inference.md, by the models of KServe's own client."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes.client
import pytest
import yaml

MODULES = "v1beta1_inference_service", "v1beta1_inference_service_spec", "v1beta1_predictor_spec", "v1beta1_model_spec"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its classes by name; the modules alone, since the package's own import wants a server's libraries."""
    found = importlib.util.find_spec("kserve")
    assert found is not None
    assert found.submodule_search_locations is not None
    for name, path in (("kserve", ""), ("kserve.models", "models")):
        module = ModuleType(name)
        module.__path__ = [str(Path(found.submodule_search_locations[0], path))]
        monkeypatch.setitem(sys.modules, name, module)
    modules = [importlib.import_module(f"kserve.models.{name}") for name in (*MODULES, "v1beta1_model_format")]
    return {name: value for module in modules for name, value in vars(module).items() if name.startswith("V1beta1")}


def check(value: Any, kind: str, models: dict[str, Any], place: str = "") -> None:
    """Raise unless a value has the type that KServe's, or Kubernetes', client gives its field."""
    if kind in ("str", "int", "bool"):
        assert type(value).__name__ == kind, place
    elif kind.startswith(("dict(", "dict[")):
        assert all(isinstance(key, str) and isinstance(one, str | int) for key, one in value.items()), place
    elif kind.startswith("list["):
        for number, one in enumerate(value):
            check(one, kind[5:-1], models, f"{place}[{number}]")
    else:
        model = models.get(kind) or getattr(kubernetes.client, kind)
        fields = {json: model.openapi_types[name] for name, json in model.attribute_map.items()}
        for key, one in value.items():
            assert key in fields, f"{place}.{key}"
            check(one, fields[key], models, f"{place}.{key}")


def test_the_manifest_of_the_page(models: dict[str, Any]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "inference.md").read_text()
    [block] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    manifest = yaml.safe_load(block)
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    check(manifest, "V1beta1InferenceService", models)
    model = manifest["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "triton"}  # the format of KServe's runtime for Triton's repositories
    assert model["protocolVersion"] == "v2"  # the only one that Triton speaks
    model["storageURI"] = model.pop("storageUri")
    with pytest.raises(AssertionError, match=r"\.spec\.predictor\.model\.storageURI"):
        check(manifest, "V1beta1InferenceService", models)

"""Models and a client of a service."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from served import ServedFiles, save_served_files, served_with

from hubert_lightning.serving.models import Models, load_models


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedFiles:
    return save_served_files(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def models(served: ServedFiles) -> Models:
    return load_models(served.model, served.kmeans)


@pytest.fixture(scope="module")
def client(models: Models) -> Iterator[TestClient]:
    with served_with(models) as client:
        yield client

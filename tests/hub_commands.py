"""A small Wikipedia on a stand-in for the hub, and the commands that prepare it."""

import threading

import hub
import pytest
from articles import command, make_articles, write_parquet
from conftest import without_network_settings


@pytest.fixture
def hub_folder(tmp_path):
    """The repository on the hub: a small Wikipedia in four files."""
    folder = tmp_path / "hub"
    config_name = "20231101.simple"
    folder.mkdir()
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config_name}\n  data_files:\n  - split: train\n    path: {config_name}/*\n---\n"
    )
    for n in range(4):
        write_parquet(folder / config_name / f"train-{n:05d}-of-00004.parquet", make_articles(1000, seed=n))
    return folder


@pytest.fixture
def serve(hub_folder, tmp_path):
    """`serve(faults)` starts a hub. Returns its handler, and the environment in which commands use it."""
    servers = []

    def start_hub(faults=()):
        server = hub.serve(hub_folder, faults=faults)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        home = tmp_path / f"home{len(servers)}"
        address = f"http://127.0.0.1:{server.server_port}"
        env = {**without_network_settings(), "HF_ENDPOINT": address, "HF_HOME": str(home)}
        return server.RequestHandlerClass, env

    yield start_hub
    for server in servers:
        server.shutdown()
        server.server_close()


def hub_command(folder, *more):
    return command(folder, "wikipedia", "--language", "simple", *more)


def without_pauses(arguments, first=""):
    """The command without its pauses between retries. `first`: a line of Python to run before it."""
    code = "import time; time.sleep = lambda seconds: None; from config import PrepareConfig; from internals import cli, start; import prepare_data"
    return [
        "-c",
        f"{code}\n{first}\nstart.run(lambda: prepare_data.prepare(cli.parse(PrepareConfig, '')))",
        *arguments[1:],
    ]

"""Shared fixtures: tiny checkpoints in real layouts, recipes over them, store servers."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import save_file
from skip_policy import add_option as pytest_addoption  # noqa: F401
from skip_policy import register as pytest_configure  # noqa: F401
from store_servers import SCHEME, SERVERS

from mmerge.pipeline import make_plan, parse_recipe, run
from mmerge.pipeline.cli.main import main

torch.set_num_threads(1)  # more threads slow tiny tensors down
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Shells ignore SIGINT in background jobs, and child processes inherit that: interrupted tests
    # would not notice the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
REPOSITORY = Path(__file__).resolve().parent.parent
LAB = REPOSITORY / "examples" / "lab" / "checkpoints"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a LLaMA checkpoint of this configuration."""
    hidden, ffn, kv = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_key_value_heads"] * config["head_dim"],
    )
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "self_attn.q_proj.weight": (hidden, hidden),
            p + "self_attn.k_proj.weight": (kv, hidden),
            p + "self_attn.v_proj.weight": (kv, hidden),
            p + "self_attn.o_proj.weight": (hidden, hidden),
            p + "mlp.gate_proj.weight": (ffn, hidden),
            p + "mlp.up_proj.weight": (ffn, hidden),
            p + "mlp.down_proj.weight": (hidden, ffn),
        }
    return shapes | {"lm_head.weight": (config["vocab_size"], hidden)}


class Lab:
    """Makes small random checkpoints and recipes over them in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = dict(CONFIG)
        self.dtype = torch.bfloat16

    def write(self, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            path / "model.safetensors",
            metadata={"format": "pt"},
        )
        (path / "config.json").write_text(json.dumps(config))
        return path

    def make_base(self, *, seed: int = 0) -> Path:
        generator = torch.Generator().manual_seed(seed)
        self.base = {
            name: torch.randn(shape, generator=generator).to(self.dtype)
            for name, shape in llama_shapes(self.config).items()
        }
        return self.write("base", self.base, self.config)

    def expert_tensors(self, seed: int, *, extra_rows: int = 2) -> dict[str, torch.Tensor]:
        """Return the base with random changes, in the tensor names of a LLaVA checkpoint.

        With a connector and added vocabulary rows.
        """
        generator = torch.Generator().manual_seed(1000 + seed)
        tensors = {}
        for name, value in self.base.items():
            tuned = value.float() + 0.05 * torch.randn(value.shape, generator=generator) ** 3
            if extra_rows and ("embed_tokens" in name or "lm_head" in name):
                tuned = torch.cat(
                    [tuned, torch.randn((extra_rows, value.shape[1]), generator=generator)]
                )
            tensors["language_model." + name] = tuned.to(self.dtype)
        tensors["multi_modal_projector.linear_1.weight"] = torch.randn(
            (16, 8), generator=generator
        ).to(self.dtype)
        tensors["vision_tower.embeddings.position_ids"] = torch.arange(9)
        return tensors

    def expert_config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": self.config | {"vocab_size": 42},
        }

    def make_expert(
        self,
        name: str,
        seed: int,
        *,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    ) -> Path:
        tensors = self.expert_tensors(seed)
        if change:
            change(tensors)
        return self.write(name, tensors, self.expert_config())

    def make_all(self, num_experts: int = 3) -> dict[str, Any]:
        """Write a base and experts, and return a recipe over them."""
        self.make_base()
        modalities = ("image", "audio", "video", "point")[:num_experts]
        for seed, name in enumerate(modalities):
            self.make_expert(name, seed)
        return {
            "name": "tiny",
            "base": "base",
            "method": "mmer",
            "output": "store",
            "experts": {name: {"path": name, "modality": name} for name in modalities},
        }

    def write_recipe(self, raw: dict[str, Any], name: str = "recipe.yaml") -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        return path


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture(scope="session")
def lab_checkpoints() -> Path:
    """The committed, trained experts."""
    return LAB


@pytest.fixture(scope="session")
def lab_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a read-only store with builds of the trained experts by `mmer` and `naive_mc`."""
    folder = tmp_path_factory.mktemp("lab") / "store"
    for method in ("mmer", "naive_mc"):
        raw = yaml.safe_load(
            (REPOSITORY / "examples" / "lab" / "recipes" / f"{method}.yaml").read_text()
        ) | {"output": str(folder)}
        run(make_plan(parse_recipe(raw, folder=REPOSITORY / "examples" / "lab" / "recipes")))
    return str(folder)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


class StoreServers:
    """Starts each object storage server at its first use and keeps it to the end of the session."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack, self._running = folder, ExitStack(), dict[str, dict[str, str]]()

    def environment(self, name: str) -> dict[str, str]:
        """Return the variables that a client of this server needs.

        Skips the test if the server is not installed.
        """
        start, is_there, reason = SERVERS[name]
        if not is_there():
            pytest.skip(reason)
        if name not in self._running:
            folder = self._folder / name
            folder.mkdir()
            self._running[name] = self._stack.enter_context(start(folder))
        return self._running[name]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="session")
def store_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServers]:
    servers = StoreServers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.close()


class Places:
    """Store URIs of any kind for one test, each new and empty."""

    def __init__(self, servers: StoreServers, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._servers, self._folder, self._patch = servers, folder, patch

    def make(self, kind: str) -> str:
        """Return the URI of an empty store of this kind and set the environment to open it."""
        if kind == "memory":
            return f"memory://{uuid.uuid4().hex}"
        if kind == "local":
            return str(self._folder / f"store-{uuid.uuid4().hex[:8]}")
        self.use(self._servers.environment(kind))
        return f"{SCHEME[kind]}://bucket/{uuid.uuid4().hex[:12]}"

    def endpoint(self, kind: str) -> str:
        return self._servers.environment(kind)["AWS_ENDPOINT_URL"]

    def use(self, environment: dict[str, str]) -> None:
        for name, value in environment.items():
            self._patch.setenv(name, value)


@pytest.fixture
def places(store_servers: StoreServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    return Places(store_servers, tmp_path, monkeypatch)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A model hub of this process in place of the real one, and an empty cache."""
    server = HubServer()
    settings = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    yield server
    server.close()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command line; return exit code and output, both streams in one text."""

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out + captured.err

    return call

"""`mmerge serve`: a composite behind OpenAI's chat protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.cli.options import (
    DTYPES,
    POLICIES,
    CheckOption,
    DtypeOption,
    EncodersOption,
    PolicyOption,
    UriArgument,
    check_choice,
)


def serve(
    uri: UriArgument,
    host: Annotated[
        str, typer.Option("--host", help="address to listen on; others than loopback need a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="port")] = 8000,
    model_name: Annotated[
        str | None,
        typer.Option(
            "--model-name",
            help="name of the model in requests [default: the recipe's name]",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="keys that requests must have, one per line [default: MMERGE_API_KEY]",
            show_default=False,
        ),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="serve everyone, on any address")
    ] = False,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(
            "--tls-certificate", metavar="FILE", help="serve HTTPS (PEM)", show_default=False
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            "--tls-key", metavar="FILE", help="key of the certificate (PEM)", show_default=False
        ),
    ] = None,
    refresh: Annotated[
        float,
        typer.Option(
            "--refresh",
            metavar="SECONDS",
            min=0,
            help="look for a newer build of STORE#NAME so often; 0: never",
        ),
    ] = 30.0,
    max_experts: Annotated[
        int,
        typer.Option(
            "--max-experts",
            metavar="COUNT",
            min=0,
            help="rebuilt experts in memory at once, asked as NAME/EXPERT; 0: none are served",
        ),
    ] = 1,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, max=1024, help="prompts generated together")
    ] = 16,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=1, help="prompts that wait; others get status 429")
    ] = 64,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-prompt-tokens",
            min=1,
            help="tokens of a prompt [default: the model's maximum]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", min=1, help="tokens of an answer where a request does not say"
        ),
    ] = 512,
    encoders: EncodersOption = None,
    check: CheckOption = True,
    policy: PolicyOption = "packed",
    dtype: DtypeOption = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, …")] = "cpu",
) -> None:
    """Answer requests of OpenAI clients about text, images, audio, video and other inputs.

    POST /v1/chat/completions, GET /v1/models, /health and /metrics. A newer build of STORE#NAME
    takes over while it runs.
    """
    try:
        from mmerge.pipeline.serving.application import ServeSettings, make_application
        from mmerge.pipeline.serving.door import read_keys
        from mmerge.pipeline.serving.server import check_address, run_server
    except ImportError as error:
        raise MmergeError(
            f"serve: needs the package {error.name!r}: install mmerge with the extra 'serve'"
        ) from error
    from mmerge.pipeline.cli.output import err

    if bool(tls_certificate) != bool(tls_key):
        raise MmergeError("--tls-certificate: give --tls-key with it, or leave both out")
    keys = () if no_api_key else read_keys(api_key_file)
    check_address(host, keys, is_open=no_api_key)
    settings = ServeSettings(
        uri=uri,
        model_name=model_name,
        device=device,
        dtype=None if dtype is None else check_choice(dtype, DTYPES, option="--dtype"),
        policy=check_choice(policy, POLICIES, option="--policy"),
        encoders=tuple(encoders or ()),
        check=check,
        refresh_s=refresh,
        max_experts=max_experts,
        max_batch=max_batch,
        max_queue=max_queue,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
    )
    app, builds = make_application(settings, keys=keys)
    scheme = "https" if tls_certificate else "http"
    names = ", ".join(name for name, _, _ in builds.list_models())
    err.print(f"serving {names} of build {builds.main.build[:12]} at {scheme}://{host}:{port}/v1")
    run_server(app, host=host, port=port, certificate=tls_certificate, certificate_key=tls_key)

"""``teacher-cache serve``: caches behind the HTTP interface of a vLLM server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    caches: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CACHE]...",
            help="Finished caches of one teacher: folders or fsspec URLs. The first that can answer does.",
            show_default=False,
        ),
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            "--upstream",
            metavar="URL",
            help="A running vLLM server of the same teacher, asked for what no cache holds.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="CACHE",
            help="A folder in which the upstream server's answers stay: a cache that grows.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="The teacher's model, as a folder or hub name, where there is no cache yet that "
            "names it.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=1,
            help="Head entries to keep of each distribution. A request for more is answered by the "
            "upstream server each time. Default: as in the caches; 64 without any.",
            show_default=False,
        ),
    ] = None,
    allow_null: Annotated[
        bool,
        typer.Option(
            "--allow-null",
            help="Answer null for positions that a cache does not store, such as those of a chat's "
            "prompt, if the last one is stored. For clients that read the answer's positions only.",
        ),
    ] = False,
    host: Annotated[
        str, typer.Option("--host", help="The address to listen at. By default only this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 8000,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env",
            metavar="NAME",
            help="The environment variable with the key that clients must send.",
            show_default=False,
        ),
    ] = None,
    upstream_model: Annotated[
        str | None,
        typer.Option(
            "--upstream-model",
            metavar="NAME",
            help="The upstream server's name for the teacher, if it is another one.",
            show_default=False,
        ),
    ] = None,
    upstream_key_env: Annotated[
        str | None,
        typer.Option(
            "--upstream-key-env",
            metavar="NAME",
            help="The environment variable with the upstream server's key.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0,
            help="Largest accepted mean difference of the upstream server's logprobs from those of "
            "the caches, in nats, beside their rounding. Default: 0.01 for caches in float32, else "
            "0.05.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answers as a vLLM server does (/v1/completions with token ids and prompt_logprobs), from
    caches. docs/serve.md says what is answered, and when it pays.
    """
    from logitcask.cache_format.cli.result import as_json, print_result
    from logitcask.pipeline.serve.run import ServeOptions
    from logitcask.pipeline.serve.run import serve as run

    def tell(server: object, url: str) -> None:
        if as_json():
            print_result({"url": url}, "")

    run(
        ServeOptions(
            caches=caches or [],
            upstream=upstream,
            keep=keep,
            teacher=teacher,
            top_k=top_k,
            upstream_model=upstream_model,
            tolerance=tolerance,
            allow_null=allow_null,
            host=host,
            port=port,
            api_key_env=api_key_env,
            upstream_key_env=upstream_key_env,
        ),
        on_ready=tell,
    )

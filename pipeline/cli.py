"""``teacher-cache``: the list of its commands. Each command is in ``pipeline/commands``, or in
``logitcask.cache_format.cli`` if it needs only a cache.
"""

from __future__ import annotations

from logitcask.cache_format.cli import (
    cache_commands,
    catalog_commands,
    share_commands,
    trust_commands,
)
from logitcask.cache_format.cli.app import Group, new_app, run
from logitcask.pipeline.commands.audit import audit
from logitcask.pipeline.commands.build import build
from logitcask.pipeline.commands.estimate import estimate
from logitcask.pipeline.commands.export import export
from logitcask.pipeline.commands.find import find
from logitcask.pipeline.commands.imports import import_
from logitcask.pipeline.commands.inspect import generations, inspect
from logitcask.pipeline.commands.model import model
from logitcask.pipeline.commands.prompts import prompts
from logitcask.pipeline.commands.push import push
from logitcask.pipeline.commands.report import report
from logitcask.pipeline.commands.serve import serve
from logitcask.pipeline.memory import use_huge_pages

app = new_app(
    "Runs a teacher LLM once over a data set and keeps its next-token distributions in a cache.",
    group=Group,
)
for command in (
    cache_commands.info,
    cache_commands.verify,
    cache_commands.derive,
    cache_commands.merge,
    audit,
    estimate,
    push,
    share_commands.pull,
    trust_commands.keygen,
    trust_commands.sign,
    build,
    find,
    catalog_commands.ls,
    catalog_commands.rm,
    catalog_commands.gc,
    inspect,
    prompts,
    generations,
    export,
    serve,
    report,
    model,
):
    app.command()(command)
app.command("import")(import_)


def main() -> None:
    """Entry point of the console script."""
    use_huge_pages()
    run(app, extra="teacher")

"""embpack quantize."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from embpack.cli import options, plans, show
from embpack.cli.json_output import describe_quantized
from embpack.convert import check_destination, check_max_loss, count_unchanged_rows, pack_checkpoint
from embpack.engines import Engine
from embpack.estimate import expect
from embpack.formats import open_checkpoint
from embpack.methods import DEFAULT_METHOD
from embpack.readers import READERS
from embpack.rules import Rules, list_left_out
from embpack.sizes import parse_size
from embpack.threads import set_num_threads
from embpack.unchanged import open_old
from embpack.variant import Variant

# How long packing takes is said before it begins if it is so long; a smaller checkpoint is not looked at for that.
_LONG_SECONDS, _LONG_BYTES = 30, 1 << 28

_check_max_bytes = options.checking(lambda text: parse_size(text, 1))
_check_max_shard_size = options.checking(parse_size)


def _check_max_loss(max_loss: float | None) -> float | None:
    if max_loss is not None:
        try:
            check_max_loss(max_loss)
        except ValueError:
            raise typer.BadParameter(f"{max_loss}; give a positive, finite number") from None
    return max_loss


def _check_address(address: str | None) -> str | None:
    """Refuse what is no address, such as SRC."""
    if address:
        _find_engine(address)
    return address


def _find_engine(address: str) -> Engine:
    from embpack.ray import Engine as RayEngine  # takes longer to import than all else, and is not always there

    try:
        return RayEngine(address or None)
    except ValueError as error:
        raise typer.BadParameter(f"{error}; --ray alone goes after SRC and DST") from None


@contextmanager
def _connected(ray: str | None) -> Iterator[tuple[Engine | None, int | None]]:
    """Connect to the workers that --ray asks for, before all that takes long; yields an engine, and how many there are.

    Packing uses the connection that there is then.
    """
    if ray is None:
        yield None, None
        return
    with _find_engine(ray).connect() as workers:
        yield _find_engine(""), workers.count


def quantize(
    src: Annotated[
        Path,
        options.of_place(
            "SRC",
            "A checkpoint: .safetensors, an index, a folder of a model or torch.distributed.checkpoint, "
            ".pt/.pth/.bin/.ckpt, .npy, .npz, .parquet, .gguf; or a URI, s3://... Tables in pieces or with scales are "
            "one.",
        ),
    ],
    dst: Annotated[
        Path | None,
        options.of_place(
            "DST",
            "A .safetensors file, or a folder, whose name has no suffix, as for a folder or an index as SRC; or a URI. "
            "What embpack wrote there is replaced.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        options.of_names("Also pack tensors of such names; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        options.of_names("Never pack tensors of such names; may be repeated."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="How rows are packed: optimal, or greedy:b=1000,r=0.5 with parameters. [bold]embpack methods[/] "
            "lists all.",
            show_default=f"{DEFAULT_METHOD}; with --auto also kmeans and trellis",
            callback=options.check_methods,
            autocompletion=options.complete_methods,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help="Bits a value: 2, 4 or 8; trellis has any from 2 to 7, such as 3.5.",
            show_default="4; with --auto all",
            callback=options.check_bits,
            autocompletion=options.complete_bits,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    param_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Scales, biases and codebooks: float16 or float32.",
            show_default="float16; float32 for uniform rows at 8 bits, and for trellis",
            callback=options.check_param_dtype,
            autocompletion=options.complete_param_dtype,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    rotate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Rotate rows first: hadamard or none. Less loss where values are heavy-tailed.",
            show_default="none; with --auto both",
            callback=options.check_rotations,
            autocompletion=options.complete_rotations,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    chosen: Annotated[
        list[Any] | None,
        typer.Option(
            "--set",
            metavar="GLOB=METHOD",
            help="Pack such tables in a way of their own, 'user_*=trellis:bits=3.5'. The last that matches counts.",
            parser=options.read_setting,
            show_default=False,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto",
            help="Choose the way of each table by its loss on a sample: the least in the bytes of 4 bits, or within "
            "the limits. Options above restrict the choice: --bits 2,4,8.",
            rich_help_panel=options.HOW,
        ),
    ] = False,
    access_counts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --auto: how often each table is looked up, as JSON; otherwise each row counts the same.",
            show_default=False,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    save_plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --auto: write the choice there.",
            show_default=False,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    plan_path: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Pack as --save-plan wrote; say which tables have changed too much since.",
            show_default=False,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --auto or --plan: the file is no larger than '2 GB', '100 KiB' or '12.5 %' of SRC.",
            show_default=False,
            callback=_check_max_bytes,
            rich_help_panel=options.LIMITS,
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="LOSS",
            help="Exit with 3, and write nothing, if a table loses more. With --auto alone: of all tables together.",
            show_default=False,
            callback=_check_max_loss,
            rich_help_panel=options.LIMITS,
        ),
    ] = None,
    readable_by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="READER",
            help=f"Only rows that {', '.join(READERS[:-1])} or {READERS[-1]} reads as they are; may be repeated.",
            callback=options.check_readers,
            autocompletion=options.complete_readers,
            show_default=False,
            rich_help_panel=options.LIMITS,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The largest file of a folder, '500 MB'; tables are cut into pieces if need be.",
            show_default="5 GB; files of an index stay",
            callback=_check_max_shard_size,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    keep_checksums: Annotated[
        bool,
        typer.Option(
            "--keep-checksums",
            help="Keep what a later --since needs.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    since: Annotated[
        Path | None,
        typer.Option(
            metavar="OLD_DST",
            help="Copy rows whose source is as it was for OLD_DST.",
            parser=options.path,
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with an interrupted run.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Write nothing; show what would be.", rich_help_panel=options.OUTPUT),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also replace what is not embpack's.", rich_help_panel=options.OUTPUT),
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="Pack by a Ray cluster's workers: auto, host:port or ray://host:port; alone by this machine's.",
            show_default=False,
            callback=_check_address,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    as_json: options.AsJson = False,
    threads: options.Threads = None,
) -> None:
    """Pack the embedding tables of a checkpoint; everything else is copied as it is.

    [dim]embpack quantize model.safetensors model-4bit.safetensors[/]
    """
    if dst is None and not dry_run:
        raise typer.BadParameter("give a destination, or --dry-run", param_hint="DST")
    ways = options.Ways(method, bits, param_dtype, rotate)
    # The readers restrict what --auto chooses from: whether they take what is tried before it chooses is no matter.
    readers, variants = readable_by or [], ways.all() if auto else []
    limits = max_bytes, max_loss, access_counts
    planning = plans.Planning(auto, plan_path, save_plan, *limits, variants, readers, max_shard_size)
    given = {"--method": method, "--bits": bits, "--param-dtype": param_dtype, "--rotate": rotate, "--set": chosen}
    planning.check(given)
    rules = Rules(
        include=include or (),
        exclude=exclude or (),
        variant=Variant() if auto else ways.only(),
        variants=dict(chosen or ()),
        readable_by=() if auto else readers,
        keep_checksums=keep_checksums or since is not None,
    )
    if not dry_run:
        show.go_on_unread()
    if threads is not None:
        set_num_threads(threads)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(src))
        find_old = stack.enter_context(open_old(since))
        if dst is not None and not dry_run:
            engine = None if ray is None else _find_engine(ray)
            check_destination(checkpoint, dst, max_shard_size, resume=resume, force=force, engine=engine)
        engine, workers = stack.enter_context(_connected(ray))
        decided, plan = planning.decide(checkpoint, rules, None if dry_run else dst, quiet=as_json)
        decisions = find_old(decided)
        # A plan that is used says what was measured when it was made; what is packed now is in the decisions.
        shown = plan if plan_path is None else None
        left_out = list_left_out(checkpoint, decisions)
        from_bytes = 0 if dry_run else _LONG_BYTES
        expected = expect(checkpoint, decisions, dst, max_shard_size, from_bytes=from_bytes, workers=workers)
        if dst is None or dry_run:
            planning.finish(plan, None)
            reused = count_unchanged_rows(checkpoint, decisions, dst, max_shard_size)
            if as_json:
                show.print_json(describe_quantized(src, dst, checkpoint, decisions, plan, expected, reused))
            else:
                sizes = sum(shard.num_bytes for shard in checkpoint.shards), expected.file_bytes
                show.print_decisions(str(src), decisions, left_out, shown, sizes)
                show.print_expected(expected, workers=workers, may_reuse=since is not None)
                show.print_reused(decisions, reused)
                if planning.max_table_loss is not None:
                    show.output.print("--max-loss judges tables once they are packed, not in a dry run", style="dim")
            return
        if not as_json:
            show.print_decisions(str(src), decisions, left_out, shown)
            show.print_expected(expected, _LONG_SECONDS, workers, may_reuse=since is not None)
        totals = {each.tensor.name: each.tensor.shape[0] for each in decisions if each.variant}
        limit = planning.max_table_loss
        with show.row_progress(totals, shown=not as_json) as progress, show.noted_interruption():
            report = pack_checkpoint(
                checkpoint,
                decisions,
                dst,
                max_loss=limit,
                max_shard_size=max_shard_size,
                resume=resume,
                force=force,
                engine=engine,
                progress=progress,
            )
    planning.finish(plan, report)
    if as_json:
        show.print_json(describe_quantized(src, dst, checkpoint, decisions, plan, report))
    else:
        show.output.print()
        show.print_report(str(dst), report)

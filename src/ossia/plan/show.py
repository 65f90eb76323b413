"""A plan as people read it."""

from __future__ import annotations

from typing import Any

from ossia.console import Side, counted, grid, shown_bytes, text_console
from ossia.train.plan import GB

_PARTS = {
    "weights": "weights, as stored",
    "expanded": "experts expanded to bfloat16",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "kept": "activations kept for backward",
    "made": "activations of the moment",
    "loss": "loss: a chunk of logits",
    "libraries": "libraries",
}
_NAMES = 2 + max(map(len, _PARTS.values()))  # width of the names' column
_CHANGES = 5


def show(result: dict[str, Any]) -> None:
    """Print it."""
    console = text_console()
    for line in _head(result):
        console.print(line, soft_wrap=True)
    console.print()
    if result["common"]:
        console.print("No GPU here; --gpu NAME shows one in full.", style="dim")
        console.print(_overview(result))
    else:
        beside = max(1, (console.width - _NAMES) // (2 + max(len(gpu["name"]) for gpu in result["gpus"])))
        for at in range(0, len(result["gpus"]), beside):
            console.print(_in_full(result, result["gpus"][at : at + beside]))
            console.print()
    for line in _rates(result):
        console.print(line, style="dim", soft_wrap=True)
    console.print(_disk(result["disk"]), soft_wrap=True)
    for gpu in [] if result["common"] else result["gpus"]:
        console.print()
        console.print(f"{gpu['name']}: {_verdict(gpu)}", style="bold", soft_wrap=True)
        for line in _advice(gpu):
            console.print(f"  {line}", soft_wrap=True)
        changes = gpu["changes"][:_CHANGES]
        width = max((len(change["flags"]) for change in changes), default=0)
        for change in changes:
            console.print(
                f"    {change['flags']:<{width}}  {shown_bytes(change['peak'])}; {change['cost']}", soft_wrap=True
            )


def _head(result: dict[str, Any]) -> list[str]:
    where = [
        "attention" if result["linear_layers"] else "",
        f"the experts of {_of(result['expert_layers'], result['layers'])} layers" if result["expert_layers"] else "",
    ]
    targets = " and ".join(filter(None, where))
    trained = f"{result['trained_parameters']:,} parameters"
    lines = [f"{result['model']}: LoRA of rank {result['lora_rank']} on {targets}, {trained}"]
    rows, accumulated, processes = result["batch"], result["accumulated"], result["processes"]
    what = counted(rows, "sequence" if result["packing"] else "row")
    batch = f"{what} of {'' if result['rows'] is None or result['packing'] else 'up to '}{result['longest']:,}"
    times = "".join(
        f" × {count} {name}" for count, name in ((accumulated, "accumulated"), (processes, "processes")) if count > 1
    )
    lines.append(f"batch: {batch} tokens{times}")
    if result["rows"] is not None:
        estimate = (
            f" (estimated by characters, as no tokenizer is here; memory for rows {result['margin']} times as long)"
        )
        about = estimate if result["margin"] > 1 else ""
        padding = 1 - result["tokens_per_epoch"] / result["padded_tokens_per_epoch"]
        padded = f"; {padding:.0%} of the passes is padding" if padding > 0.005 else ""
        lines.append(f"data: {counted(result['rows'], 'row')}, {result['tokens_per_epoch']:,} tokens{about}{padded}")
        steps, epoch = result["optimizer_steps"], result["optimizer_steps_per_epoch"]
        whole = f"; {steps:,} in all" if steps != epoch else ""
        lines.append(f"optimizer steps: {epoch:,} in an epoch{whole}")
    return lines


def _in_full(result: dict[str, Any], gpus: list[dict[str, Any]]) -> Any:
    numbers: list[Side] = ["right"] * len(gpus)
    table = grid("left", *numbers)
    table.add_row("GB at the largest moment", *[gpu["name"] for gpu in gpus], style="bold")
    for part, name in _PARTS.items():
        if any(gpu["parts"][part] for gpu in gpus):
            table.add_row(f"  {name}", *[f"{gpu['parts'][part] / GB:.2f}" for gpu in gpus])
    table.add_row("peak", *[f"{gpu['peak'] / GB:.2f}" for gpu in gpus], style="bold")
    table.add_row("with every layer made again", *[f"{gpu['all_again'] / GB:.2f}" for gpu in gpus], style="dim")
    table.add_row("the run may take", *[f"{gpu['budget'] / GB:.2f}" for gpu in gpus])
    table.add_row("fits", *["yes" if gpu["fits"] else "no" for gpu in gpus], style="bold")
    table.add_row("host memory, GB", *[f"{gpu['host'] / GB:.1f}" for gpu in gpus])
    table.add_row("passes a step", *[_passes(gpu) for gpu in gpus])
    table.add_row("layers made again", *[f"{_again(gpu)} of {result['layers']}" for gpu in gpus])
    table.add_row("tokens/s", *[_speed(gpu) for gpu in gpus])
    table.add_row(*_times(result, gpus))
    steps = result["optimizer_steps"]
    if steps and steps != result["optimizer_steps_per_epoch"]:
        times = [_time(gpu["speed"]["seconds"]) if gpu["speed"] else "?" for gpu in gpus]
        table.add_row(f"all {steps:,} optimizer steps", *times)
    return table


def _overview(result: dict[str, Any]) -> Any:
    table = grid("left", "left", "right", "right", "right", "right")
    table.add_row("", "", "peak GB", "of", "tokens/s", _times(result, [])[0], style="bold")
    for gpu in result["gpus"]:
        note = "no" if not gpu["fits"] else "fits, slow" if gpu["slow"] else "fits"
        numbers = f"{gpu['peak'] / GB:.1f}", f"{gpu['budget'] / GB:.1f}"
        table.add_row(gpu["name"], note, *numbers, _speed(gpu), _times(result, [gpu])[1])
    return table


def _times(result: dict[str, Any], gpus: list[dict[str, Any]]) -> list[str]:
    """A row's name, and how long it takes on each."""
    if result["rows"] is None:
        name, key, times = "a million tokens", "tokens_per_second", 1e6
        return [name, *[_time(times / gpu["speed"][key]) if gpu["speed"] else "?" for gpu in gpus]]
    return ["an epoch", *[_time(gpu["speed"]["seconds_per_epoch"]) if gpu["speed"] else "?" for gpu in gpus]]


def _verdict(gpu: dict[str, Any]) -> str:
    if gpu["fits"]:
        return f"fits, {(gpu['budget'] - gpu['peak']) / GB:.1f} GB to spare"
    if gpu["budget"] > gpu["free"]:
        return f"does not fit: --memory_budget is over the {shown_bytes(gpu['free'])} that are free"
    return f"does not fit: the leanest plan takes {shown_bytes(gpu['peak'])}, {shown_bytes(gpu['budget'])} may be taken"


def _advice(gpu: dict[str, Any]) -> list[str]:
    if not gpu["fits"]:
        larger = [f"as it is, it fits on: {gpu['larger']}"] if gpu["larger"] else []
        return [*larger, "makes it fit:" if gpu["changes"] else "no change of flags makes it fit"]
    lines = list(gpu["lines"])
    if _again(gpu):
        lines.append(f"with {shown_bytes(gpu['none_again'])} no layer would be made again")
    return [*lines, *(["faster:"] if gpu["changes"] else [])]


def _rates(result: dict[str, Any]) -> list[str]:
    """Where the rates come from."""
    gpus = [gpu for gpu in result["gpus"] if gpu["speed"]]
    lines = []
    kinds = {True: "tokens/s as measured:", False: "~ estimated by work, bfloat16 peak and bandwidth, from"}
    for measured, said in kinds.items():
        cases: dict[str, dict[str, None]] = {}
        for source in (gpu["speed"]["source"] for gpu in gpus if gpu["speed"]["measured"] == measured):
            cases.setdefault(f"{source['device']} (commit {source['commit']})", {})[_case(source)] = None
        if cases:
            where = "; ".join(f"{', '.join(which)} on {on}" for on, which in cases.items())
            lines.append(f"{said} {where}")
    if any(not gpu["speed"]["measured"] and not gpu["grouped"] for gpu in gpus):
        lines.append("expect less below compute capability 9.0, where torch multiplies experts one by one")
    lines += dict.fromkeys(f"?: {gpu['no_speed']}" for gpu in result["gpus"] if gpu["no_speed"])
    if any(gpu["slow"] for gpu in gpus):
        lines.append("with few experts at a time or experts in host memory, rates were seen to vary twofold")
    return lines


def _case(source: dict[str, Any]) -> str:
    again = f", {source['again']} layers made again" if source["again"] else ""
    return f"{source['tokens_per_second']:,} ({source['size']}, {source['case']}{again})"


def _disk(disk: dict[str, Any]) -> str:
    parts = [f"weights to download {shown_bytes(disk['weights'])}" if disk["weights"] else "weights are here"]
    if disk["checkpoints"] is None:
        parts.append(f"{shown_bytes(disk['checkpoint'])} a checkpoint")
    elif disk["checkpoints_at_a_time"]:
        count = disk["checkpoints_at_a_time"]
        parts.append(f"{counted(count, 'checkpoint')} {shown_bytes(disk['checkpoints'])}")
    if disk["rows"]:
        parts.append(f"tokenised rows {shown_bytes(disk['rows'])}")
    small, large = (shown_bytes(disk["merged"][kind]) for kind in ("mxfp4", "bf16"))
    exported = f"a merged model {small} (mxfp4, gguf) or {large} (bf16) more"
    short = ", too little" if disk["needed"] > disk["free"] else ""
    return f"disk: {', '.join(parts)}; {exported}; {shown_bytes(disk['free'])} free here{short}"


def _speed(gpu: dict[str, Any]) -> str:
    speed = gpu["speed"]
    if speed is None:
        return "?"
    if speed["measured"]:
        return f"{speed['tokens_per_second']:,}"
    digits = 10 ** max(0, len(str(speed["tokens_per_second"])) - 2)
    return f"~{round(speed['tokens_per_second'] / digits) * digits:,}"


def _again(gpu: dict[str, Any]) -> int:
    return sum(count for kind, count in gpu["recompute"].items() if kind != "none")


def _passes(gpu: dict[str, Any]) -> str:
    return f"{gpu['passes_per_step']:.1f}".removesuffix(".0")


def _of(count: int, whole: int) -> str:
    return f"all {whole}" if count == whole else f"{count} of {whole}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"

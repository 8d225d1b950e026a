"""Results of evaluate.py as tables, to paste into a README, and plots.

    report(results, settings, Path("runs/evaluate.jsonl"))     # plots go beside the file

`results.cells` is {key: cell}. A key is part/.../method, and a cell is one result of evaluate.py.
Intervals are bootstrap intervals of 95 %.
"""
import torch

from evaluation import ruler, texts


def report(results, settings, out):
    """Prints tables of the results so far, and draws plots beside the file `out`."""
    lengths = [n for n in settings["lengths"] if by_method(results, n)]
    for length in lengths:
        print(dense_table(results, length, settings["seed"]), end="\n\n")
    if lengths := [n for n in lengths if len(by_method(results, n)) > 1]:   # at several budgets
        plot(results, settings, lengths, out.with_suffix(".png"))
    needles = [len(select(results, "needle", n, depth)) for n in settings["needle_lengths"]
               for depth in settings["depths"]]
    if 0 < min(needles) == max(needles):                    # a map without holes
        print(needle_table(results, settings))
        plot_needles(results, settings, out.with_name(f"{out.stem}-needles.png"))
    if settings["ruler_lengths"]:
        print("", ruler_table(results, settings), sep="\n")


def interval(groups, seed, draws=1000):
    """(mean, low, high), a 95 % bootstrap interval: draws groups (texts), then values in each."""
    values = torch.tensor(groups, dtype=torch.float64)                      # (texts, positions)
    dice = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(values), (draws, len(values)), generator=dice)
    columns = torch.randint(values.shape[1], (draws, *values.shape), generator=dice)
    means = values[rows].gather(-1, columns).mean((1, 2))
    return values.mean().item(), *means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def select(results, *parts):
    """{rest of the key: cell} of the cells whose key begins with these parts."""
    start = "/".join(map(str, parts)) + "/"
    return {key[len(start):]: cell for key, cell in results.cells.items() if key.startswith(start)}


def by_method(results, length):
    """{"named" or a share: {method: a cell for each text}}, of texts with all methods measured."""
    found, every = {}, [select(results, "dense", kind, length) for kind in texts.KINDS]
    for cells in every:
        for key, cell in cells.items() if len(cells) == max(map(len, every)) else ():
            group, method = key.split("/")
            found.setdefault(group, {}).setdefault(method, []).append(cell)
    return found


def mean(values):
    return torch.tensor(values, dtype=torch.float64).mean().item()


def dense_table(results, length, seed):
    found = by_method(results, length)["named"]
    lines = [f"{length:,} tokens, {len(next(iter(found.values())))} texts", "",
             "| method | bytes of dense | perplexity to dense (95 %) | KL to dense (95 %) | KL p95 "
             "| top-1 | output error | mass read | top 100 read |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, cells in found.items():
        kl = [cell["kl"] for cell in cells]
        center, low, high = interval(kl, seed)
        worse = [[x - y for x, y in zip(c["nll"], c["nll_dense"], strict=True)] for c in cells]
        more = [100 * x for x in torch.tensor(interval(worse, seed)).expm1().tolist()]
        p95 = torch.tensor(kl).flatten().quantile(0.95).item()
        share, same, error, mass, recall = (mean([c[x] for c in cells]) for x in (
            "share", "same", "error", "mass", "recall"))
        lines.append(f"| {name} | {share:.1%} | {more[0]:+.2f} % ({more[1]:+.2f} to "
                     f"{more[2]:+.2f}) | {center:.4f} ({low:.4f} to {high:.4f}) | {p95:.4f} | "
                     f"{same:.1%} | {error:.3f} | {mass:.1%} | {recall:.1%} |")
    return "\n".join(lines)


def needle_table(results, settings):
    lines = ["| needle's mass read exactly | " + " | ".join(
        f"{n:,}" for n in settings["needle_lengths"]) + " | cluster's rank: median, p90 |",
             "|---|" + "---|" * (len(settings["needle_lengths"]) + 1)]
    cells = {n: [select(results, "needle", n, depth) for depth in settings["depths"]]
             for n in settings["needle_lengths"]}
    for name in next(iter(cells.values()))[0]:
        shares = [f"{mean([c[name]['kept'] for c in found]):.1%}" for found in cells.values()]
        ranks = torch.tensor([float(r) for found in cells.values() for c in found
                              for r in c[name]["ranks"]])
        rank = ", ".join(f"{ranks.quantile(x):.0f}" for x in (0.5, 0.9)) if len(ranks) else "-"
        lines.append(f"| {name} | " + " | ".join(shares) + f" | {rank} |")
    return "\n".join(lines)


def ruler_table(results, settings):
    lines = ["| task | tokens | samples | dense | ours | ours - dense (95 %) "
             "| paper - dense (95 %) |", "|---|---|---|---|---|---|---|"]
    for length in settings["ruler_lengths"]:
        found = {name: select(results, "ruler", name, length) for name in ruler.TASKS}
        lines += [f"| {name} | {length:,} | 0 | no sample fits | | | |"
                  for name, cells in found.items() if "none" in cells]
        rows = {name: list(cells.values()) for name, cells in found.items()
                if cells and "none" not in cells}
        rows["all tasks"] = [cell for cells in rows.values() for cell in cells]
        for name, cells in rows.items():
            if cells:
                gaps = [interval([[c[x] - c["dense"]] for c in cells], settings["seed"])
                        for x in ("ours", "paper")]
                lines.append(f"| {name} | {length:,} | {len(cells)} | "
                             f"{mean([c['dense'] for c in cells]):.1f} | "
                             f"{mean([c['ours'] for c in cells]):.1f} | " + " | ".join(
                                 f"{x:+.1f} ({low:+.1f} to {high:+.1f})" for x, low, high in gaps)
                             + " |")
    return "\n".join(lines)


COLORS = {"window": "C0", "quest": "C1", "oracle": "C2", "paper": "C3", "ours": "C4"}


def plot(results, settings, lengths, path):
    """The Pareto front: KL, and output error where it is known, against bytes; by length."""
    from matplotlib.figure import Figure
    values = {"kl": "KL to dense, nats a token"} | (
        {"error": "relative error of a head's output"} if settings["errors"] else {})
    size = 5.5 * len(lengths) + 1, 4 * len(values) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(values), len(lengths), squeeze=False)
    for (value, label), row in zip(values.items(), panels, strict=True):
        for axes, length in zip(row, lengths, strict=True):
            draw_front(axes, by_method(results, length), value, settings["seed"])
            axes.set(yscale="log", ylabel=label, title=f"{length:,} tokens",
                     xlabel="bytes read a step, % of dense")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper",
                  frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_front(axes, groups, value, seed):
    """A line for each method over its budgets, with intervals. A star: a method as configured."""
    def point(cells):
        numbers = [torch.tensor(cell[value]).flatten().tolist() for cell in cells]
        return 100 * mean([cell["share"] for cell in cells]), *interval(numbers, seed)

    for method, color in COLORS.items():
        found = [cells[method] for name, cells in groups.items()
                 if name != "named" and method in cells]
        if found:
            x, y, low, high = zip(*sorted(map(point, found)), strict=True)
            axes.plot(x, y, "o-", color=color, label=method, markersize=4)
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    for method in [x for x in ("paper", "ours") if x in groups["named"]]:
        x, y, _, _ = point(groups["named"][method])
        axes.plot(x, y, "*", color=COLORS[method], markersize=14, label=f"{method} as configured")
    axes.grid(alpha=0.3)


MAPS = {"answer": "probability of the answer's tokens, %", "kept": "needle's mass read, %"}


def plot_needles(results, settings, path):
    """Heat maps of depth and length: how likely the answer is, and how much of a needle is read."""
    from matplotlib.figure import Figure
    lengths, depths = settings["needle_lengths"], settings["depths"]
    cells = [[select(results, "needle", n, depth) for n in lengths] for depth in depths]
    names = list(cells[0][0])
    figure = Figure(figsize=(1.9 * len(names) + 1.5, 6.4), layout="constrained")
    panels = figure.subplots(len(MAPS), len(names), sharex=True, sharey=True, squeeze=False)
    for (value, label), row in zip(MAPS.items(), panels, strict=True):
        for axes, name in zip(row, names, strict=True):
            share = [[100 * cell[name][value] for cell in found] for found in cells]
            image = draw_map(axes, share)
            axes.set_xticks(range(len(lengths)), [f"{n // 1024}K" for n in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        figure.colorbar(image, ax=row, label=label)
    for axes, name in zip(panels[0], names, strict=True):
        axes.set_title(name.replace(", ", ",\n"), fontsize=9)
    figure.supylabel("depth of the needle", fontsize=10)
    figure.savefig(path, dpi=150)


def draw_map(axes, share):
    """An image of rows of numbers from 0 to 100: each a colour with its number on it."""
    image = axes.imshow(share, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for i, row in enumerate(share):
        for j, x in enumerate(row):
            axes.text(j, i, f"{x:.0f}", ha="center", va="center", fontsize=8,
                      color="black" if x > 60 else "white")
    return image

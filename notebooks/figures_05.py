"""The pictures of notebook 05."""
import matplotlib.pyplot as plt
from plots import BLUE, DARK, LIGHT, MIDDLE, arrow, axes, box, canvas, label, note


def draw_compiler():
    """From a function to code: what is kept, and what makes the compiler run again."""
    ax = canvas("The compiler runs only if no kept code has guards that hold",
                15, 5.6)
    box(ax, 0.2, 3.5, 2.5, 1.2, "a call with\nits tensors")
    box(ax, 4.4, 3.5, 3, 1.2, "guards of all\nkept graphs", LIGHT)
    box(ax, 12, 3.5, 2.6, 1.2, "run the\nkept code", BLUE)
    arrow(ax, (2.7, 4.1), (4.4, 4.1))
    arrow(ax, (7.4, 4.1), (12, 4.1))
    note(ax, 9.7, 4.45, "one set holds: fast", ha="center")
    box(ax, 4.4, 0.7, 3, 1.2, "trace: run once with\nstand-ins for tensors")
    box(ax, 8.6, 0.7, 2.4, 1.2, "graph of\noperations", LIGHT)
    box(ax, 12, 0.7, 2.6, 1.2, "backend: kernels,\nmachine code")
    arrow(ax, (5.9, 3.5), (5.9, 1.9), "none holds: recompile")
    arrow(ax, (7.4, 1.3), (8.6, 1.3))
    arrow(ax, (11, 1.3), (12, 1.3))
    arrow(ax, (13.3, 1.9), (13.3, 3.5), "keep")
    note(ax, 5.9, 0.3, "graph break: the graph ends where Python needs a tensor's value",
         ha="center", color=MIDDLE)
    plt.show()


def plot_compilations(static, automatic, masked):
    """How many times the compiler has run, after each step, by the kind of cache."""
    n = len(static)
    ax = axes(f"A growing cache is compiled {static[-1]} times in {n} steps, one with room "
              f"{masked[-1]} time", "step", "compilations so far")
    x = range(1, n + 1)
    for y, colour, dash, name in ((static, DARK, "-", "cat, each shape anew"),
                                  (automatic, MIDDLE, "-", "cat, shape as a symbol"),
                                  (masked, BLUE, "--", "one shape, masked")):
        ax.plot(x, y, color=colour, linestyle=dash, drawstyle="steps-mid")
        label(ax, n, y[-1], name)
    ax.set(ylim=(0, n + 1), xlim=(1, n), xticks=x)
    plt.show()


def plot_kernels(counts):
    """counts {name: (operations, kernels of the compiler, calls of a library)}."""
    ax = axes("One kernel holds a softmax or a gather; products, sorts and top-k split it",
              "how many", "", size=(7.5, 2.9))
    for row, (n_ops, n_kernels, n_calls) in enumerate(counts.values()):
        ax.barh(row - 0.2, n_ops, 0.36, color=LIGHT)
        ax.barh(row + 0.2, n_kernels, 0.36, color=BLUE)
        ax.barh(row + 0.2, n_calls, 0.36, left=n_kernels, color=DARK)
    for name, colour in (("operations of the graph", LIGHT),
                         ("kernels that the compiler wrote", BLUE),
                         ("calls of a library's function", DARK)):
        ax.barh(0, 0, color=colour, label=name)
    ax.set(yticks=range(len(counts)), yticklabels=counts, ylim=(len(counts) - 0.4, -0.6))
    ax.legend(loc="lower right", fontsize=9)
    plt.show()

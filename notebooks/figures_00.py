"""The figures of notebook 00: drawings only, nothing is measured."""
import matplotlib.pyplot as plt
from plots import BLUE, DARK, LIGHT, MIDDLE, arrow, box, canvas, note, strip


def model_step():
    """From a token to the next, and where the cache stands."""
    ax = canvas("One decode step: attention in a layer reads the whole cache of this layer", 15, 6)
    box(ax, 0.2, 2.6, 1.8, 0.9, "token t")
    box(ax, 2.8, 2.6, 2.4, 0.9, "embedding")
    box(ax, 6, 1.6, 4.6, 4.1)
    note(ax, 6.15, 5.35, "one layer of many", color=MIDDLE)
    for n, name in enumerate(("q, k, v of token t (RoPE)", "attention", "feed-forward")):
        box(ax, 6.4, 4.25 - n * 1.2, 3.8, 0.75, name, DARK if n == 1 else "white")
    for y in (4.25, 3.05):
        arrow(ax, (8.3, y), (8.3, y - 0.45))
    arrow(ax, (2, 3.05), (2.8, 3.05)); arrow(ax, (5.2, 3.05), (6, 3.05))
    arrow(ax, (10.6, 3.05), (11.4, 3.05)); arrow(ax, (13.1, 3.05), (13.5, 3.05))
    box(ax, 11.4, 2.6, 1.7, 0.9, "sampling")
    note(ax, 13.6, 3.05, "token\nt + 1")
    strip(ax, 6.4, 0.75, [LIGHT] * 17 + [BLUE], width=0.4, height=0.3)
    strip(ax, 6.4, 0.4, [LIGHT] * 17 + [BLUE], width=0.4, height=0.3)
    arrow(ax, (7.2, 1.1), (7.2, 3.05), color=BLUE)
    note(ax, 0.2, 0.75, "cache: keys and values of tokens 0 to t,\nof each layer and kv head")
    note(ax, 13.75, 0.75, "k, v of\ntoken t", color=BLUE)
    plt.show()


def dense_and_retro():
    """What attention reads, dense and ours."""
    ax = canvas("Dense attention reads all tokens; RetroInfer reads a few and estimates others",
                15, 4.4)
    zones = [DARK] * 2 + [MIDDLE] * 3 + [LIGHT] * 5 + [BLUE] * 2 + [LIGHT] * 6 + [MIDDLE] * 4
    zones += [LIGHT] * 4 + [BLUE] * 1 + [MIDDLE] * 2 + [DARK] * 3
    note(ax, 0.1, 3.6, "dense")
    strip(ax, 2, 3.3, [DARK] * 32)
    note(ax, 0.1, 2.3, "RetroInfer")
    strip(ax, 2, 2, zones)
    note(ax, 2, 1.45, "first tokens", fontsize=8)
    note(ax, 14.8, 1.45, "latest tokens", fontsize=8, ha="right")
    for x, colour, text in ((0.1, DARK, "steady: exact"), (3.6, BLUE, "retrieved: exact"),
                            (7.6, MIDDLE, "estimated"), (10.6, LIGHT, "dropped")):
        box(ax, x, 0.3, 0.5, 0.5, "", colour)
        note(ax, x + 0.7, 0.55, text)
    plt.show()


def paper():
    """The paper in one picture."""
    ax = canvas("RetroInfer in one picture", 18, 9, scale=0.56)
    box(ax, 5.2, 7.9, 2.8, 0.8, "query q of token t", BLUE)
    note(ax, 8.3, 8.3, "one kv head; its G query heads ask together")
    note(ax, 6.3, 7.15, "1. compare q with every centroid c: q·c ranks the clusters")
    arrow(ax, (6, 7.9), (6, 6.4), color=BLUE)
    note(ax, 0, 6.1, "index: the centroid, mean value\nand size of each of C clusters")
    note(ax, 0, 4.2, "steady zone:\nfirst, latest")
    note(ax, 5.2, 4.75, "store: keys and values of all tokens, cluster by cluster")
    strip(ax, 2.3, 3.95, [DARK] * 2, width=0.36, height=0.5)
    strip(ax, 3.3, 3.95, [DARK] * 4, width=0.36, height=0.5)
    draw_clusters(ax)
    for x, width, colour, text in (
            (2.1, 2.8, DARK, "keys and values\nas they are"),
            (5.2, 4.5, BLUE, "2. best R clusters:\nkeys and values of their tokens"),
            (10.1, 6.2, MIDDLE, "3. next E clusters: centroid, mean value,\n"
             "log(size) added to the logit")):
        box(ax, x, 1.9, width, 1.1, text, colour)
        arrow(ax, (x + width / 2, 1.9), (x + width / 2, 1.3), color=colour)
    arrow(ax, (3.5, 3.9), (3.5, 3), color=DARK)
    box(ax, 2.1, 0.6, 14.2, 0.7, "4. one softmax over all entries; the weighted mean of values")
    note(ax, 2.1, 0.15, "The other clusters (light) are dropped: nothing of their tokens is read.",
         fontsize=8.5)
    plt.show()


def draw_clusters(ax):
    """Clusters in index and store; what is read of them goes down."""
    sizes, colours = (3, 5, 2, 4, 3, 6, 4), (BLUE, LIGHT, BLUE, MIDDLE, LIGHT, MIDDLE, LIGHT)
    x = 5.2
    for n, (size, colour) in enumerate(zip(sizes, colours, strict=True)):
        end = x + 0.36 * size
        strip(ax, x, 3.95, [colour] * size, width=0.36, height=0.5)
        box(ax, x, 5.8, end - x, 0.6, f"c{n}", colour)
        if colour == BLUE:                      # its tokens are read
            arrow(ax, ((x + end) / 2, 3.9), ((x + end) / 2, 3), color=BLUE)
        if colour == MIDDLE:                    # its centroid is enough
            arrow(ax, (end - 0.05, 5.8), (end + 0.3, 3), color=MIDDLE)
        x = end + 0.45


def life():
    """Prefill, update, decode, in time."""
    ax = canvas("The three calls of a cache, in time", 15, 4.6)
    for x, width, name, what in ((0.2, 4, "prefill", "attends exactly,\nclusters full segments"),
                                 (4.6, 2, "update", "clusters the rest\nof the prompt"),
                                 (7, 3, "256 decodes", "one step per token;\nits k, v stay exact"),
                                 (10.4, 1.8, "update", "clusters\nthe 256"),
                                 (12.6, 2.2, "decode ...", "")):
        box(ax, x, 2.6, width, 1, name, DARK if name == "update" else "white")
        note(ax, x + 0.1, 1.8, what, fontsize=8.5)
        if x > 0.2:
            arrow(ax, (x - 0.4, 3.1), (x, 3.1))
    note(ax, 0.2, 0.6, "The index is built while the text is read, and extended while text is "
         "generated. Old clusters never change.")
    plt.show()


def tensors():
    """The shapes of a step."""
    ax = canvas("Shapes of one layer's step", 15, 4.2)
    for x, name, shape, what in ((0.2, "q", "(B, H, G, D)", "G query heads\nshare a kv head"),
                                 (3.3, "centroids", "(B, H, C, D)", "scores: (B, H, G, C)"),
                                 (6.4, "k, v read", "(B, H, W + N, D)", "steady, retrieved"),
                                 (9.5, "estimates", "(B, H, E, D)", "centroids, mean values"),
                                 (12.4, "output", "(B, H, G, D)", "as q")):
        box(ax, x, 2.3, 2.4, 1.2, f"{name}\n{shape}", BLUE if name in ("q", "output") else "white")
        note(ax, x, 1.6, what, fontsize=8.5)
    note(ax, 0.2, 0.6, "The G query heads of a group share a key: (B, H, G, D) times (B, H, D, C) "
         "is one product.")
    plt.show()

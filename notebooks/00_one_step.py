# %% [markdown]
# # What happens in one decode step?
#
# **Goal.** See the whole method in a few drawings before any code: what a decode step is, what it
# reads, and what RetroInfer changes. This notebook is also the map of the others.
#
# **You need.** To know what a transformer and softmax attention are. Nothing of the paper.
#
# **Time.** Seconds to run, ten minutes to read.
#
# **Paper.** Chen et al., *RetroInfer: A Vector Storage Engine for Scalable Long-Context LLM
# Inference*, PVLDB 19(5), 2026, [arXiv 2505.02922](https://arxiv.org/abs/2505.02922).
#
# **Before and after.** [README](../README.md) ·
# [01 where attention goes](01_where_attention_goes.ipynb)

# %%
import figures_00 as figures
from plots import versions

print(versions())

# %% [markdown]
# ## A decode step
#
# A language model writes one token at a time. To write the next one, the latest token goes through
# all layers. A layer has several *heads*, and each head computes an attention of its own. The
# latest token gives the head a *query* q. Each token before it has a *key* k and a *value* v. The
# output of the head is a mean of the values, weighted by softmax(q·k). Here and below, q is divided
# by √D already, where D is the number of channels of a key. Several query heads may share the keys
# and values of one *kv head*.
#
# Keys and values of earlier tokens do not change. So they are kept, in the *KV cache*.

# %%
figures.model_step()

# %% [markdown]
# ## Why it is slow
#
# A step does little arithmetic, but reads the whole cache. After 131,072 tokens, the cache of
# Llama-3.1-8B takes 16 GiB (at 16 bits per number), and each step reads all of it. Most of the
# cache is read in vain: in a typical head, a few per cent of the tokens have nine tenths of the
# weight (notebook 01). The query decides *which* tokens these are. To find them without reading
# every key is a search problem. So the cache becomes a vector store with an index.

# %%
figures.dense_and_retro()

# %% [markdown]
# ## The paper in one picture
#
# Keys that point the same way are put in a *cluster*. A cluster has a *centroid*, the mean of its
# keys. A step does four things:
#
# 1. It compares the query with the centroids only, and ranks the clusters.
# 2. It reads the keys and values of the best R clusters: the *retrieval zone*.
# 3. It does not read the tokens of the next E clusters: the *estimation zone*. The centroid of such
#    a cluster stands for its tokens. A cluster of s tokens counts as s tokens with equal keys. To
#    count s times, log(s) is added to the logit q·c of its centroid c.
# 4. It takes one softmax over the retrieved tokens, the estimated clusters and the *steady zone*.
#    The steady zone holds the first and the latest tokens, which are always exact.

# %%
figures.paper()

# %% [markdown]
# In symbols, X are the tokens of the steady and the retrieval zone, and Y are the estimated
# clusters. Cluster *j* has the size $s_j$, the centroid $c_j$ and the mean value $m_j$. The query q
# is divided by √D already. The output is
#
# $$o = \frac{\sum_{i \in X} e^{q k_i} v_i + \sum_{j \in Y} s_j e^{q c_j} m_j}
#            {\sum_{i \in X} e^{q k_i} + \sum_{j \in Y} s_j e^{q c_j}}$$
#
# The weights sum to one over both kinds of entries. If all clusters are retrieved, this is dense
# attention. In [retroinfer.py](../retroinfer.py) it is the function `tripartite_attention`.

# %%
figures.tensors()

# %% [markdown]
# ## The life of the index
#
# The index is built from the prompt, segment by segment. Generated tokens stay exact in the steady
# zone at first. When 256 of them are older than the latest 32 tokens (the *local window*), `update`
# clusters the 256 together.

# %%
figures.life()

# %% [markdown]
# ## Glossary
#
# | letter | is | | letter | is |
# |---|---|---|---|---|
# | B | batch: texts that run together | | C | clusters of a kv head |
# | H | kv heads of a layer | | P | most tokens in a cluster; larger ones are cut |
# | G | query heads that share a kv head | | R, E | clusters retrieved, estimated |
# | T | tokens of a text | | N | rows with room for the tokens that a step retrieves |
# | D | numbers in a key, a query or a value | | W | rows of the steady zone |
#
# | word | is |
# |---|---|
# | prefill, decode | reading a prompt at once; writing one token |
# | kv head | one key and one value a token; G query heads share it |
# | logit | q·k, before the softmax; q is divided by √D already |
# | RoPE | turns keys and queries by an angle that grows with their position |
# | sink | the first tokens: many heads give them much attention, whatever the text says |
# | steady zone | the first and the latest tokens, and tokens not in a cluster yet: always exact |
# | segment | tokens that are clustered together |
# | store | all keys and values; the tokens of a cluster lie side by side in it |
# | wave index | centroids, mean values and sizes of the clusters: a step ranks clusters by it |
# | wave buffer | the store on the host, and a cache of its blocks on the GPU (notebook 07) |
# | dense attention | the exact result, from all tokens: what we compare with |
# | KL | Kullback-Leibler divergence of next-token probabilities from dense attention's; 0: equal |
#
# ## Map
#
# Each notebook asks one question, builds the answer by hand with real keys, and compares it with
# the library. 01 to 04 are the method: read them in order. After them, read what you like: the top
# of each notebook says which others it needs.
#
# | | question |
# |---|---|
# | [01](01_where_attention_goes.ipynb) | Why is decoding slow, and how little matters? |
# | [02](02_clusters.ipynb) | Can keys be indexed? |
# | [03](03_three_zones.ipynb) | What is lost if most tokens are only estimated? |
# | [04](04_the_wave_index.ipynb) | How does the index live through a generation? |
# | [05](05_compile.ipynb) | What makes PyTorch code compile well? |
# | [06](06_kernels.ipynb) | What does a hand-written kernel add? |
# | [07](07_the_wave_buffer.ipynb) | How can the host hold the cache without slowing the device? |
# | [08](08_why_vector_indexes_fail.ipynb) | Why do vector indexes fail on attention? |
# | [09](09_one_bit.ipynb) | What can one bit a number keep of a key? |
# | [10](10_which_when.ipynb) | Which method, and when? |
# | [11](11_error_bars.ipynb) | How far is a step from dense attention? |
#
# ## How to run
#
# `make setup` makes a virtual environment and fetches the default model. Then, in this folder,
# `jupyter lab`, with the kernel of that environment. The first run of a notebook lets the model
# read a text. This takes a minute or two, and the result is kept in `.cache`. `make notebooks` runs
# all notebooks.
#
# The first exercise of a notebook has a `check`: it shows your result beside the expected one.
# Answers are folded.
#
# ## References
#
# - RetroInfer: Chen et al., PVLDB 19(5), 2026, [arXiv 2505.02922](https://arxiv.org/abs/2505.02922).
# - RetrievalAttention: Liu et al., 2024, [arXiv 2409.10516](https://arxiv.org/abs/2409.10516).
# - AnTKV, 2025, [arXiv 2506.19505](https://arxiv.org/abs/2506.19505).
# - The sink: Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, 2023,
#   [arXiv 2309.17453](https://arxiv.org/abs/2309.17453).
# - RoPE: Su et al., *RoFormer*, 2021, [arXiv 2104.09864](https://arxiv.org/abs/2104.09864).

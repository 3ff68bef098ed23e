"""Trees of tokens: what they hold, and that models compute in them what they compute alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine
from heretic_kl.engine.teacher_forcing.batches import ForcedBatches, ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import forced_hidden_states, run_forced
from heretic_kl.kl import row_statistics
from heretic_kl.model import TreeAttention, edited, find_capabilities, run_tree
from heretic_kl.model.forward import tree_attention
from heretic_kl.model.forward.token_tree import MAX_SCORES, TokenTree, tree_rectangles
from heretic_kl.prompts import Prompt
from heretic_kl.requests import TeacherForcedRequest
from heretic_kl.testing import load_tiny_model, tiny_tokenizer, zoo

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)
REASONS = {
    "llama": None,
    "gpt2": None,
    "qwen3_moe": None,
    "deepseek_v3": None,  # keys are wider than values
    "gemma2": "some of its layers see no more than 8 tokens",  # softly capped scores
    "gpt_oss": "some of its layers see no more than 8 tokens",  # sinks
    "bloom": "this model takes no token positions",
    "mamba": "this model takes no token positions",
    "qwen3_next": "some of its layers pass a state from token to token",
    "recurrent_gemma": "some of its layers",
}
FORKS = [(5, 6, 7, 8), (5, 6, 7, 9, 10, 11), (5, 6, 12), (13, 14), (5, 6, 7, 9, 3)]
RESPONSES = [(4, 3, 9), (7,), (8, 2), (6, 5), (1, 2, 3)]
FORCED = [ForcedSequence(p, a) for p, a in zip(FORKS, RESPONSES, strict=True)]


def load(name, folder):
    zoo.tiny_model(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_tiny_model(folder)


@pytest.fixture(scope="module", params=list(REASONS)[:6])  # shorter than a window here
def lm(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp(request.param))


def plan_of(lm, seed):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(seed))
    return {key: ablation_operator(direction, 0.8) for key in lm.architecture.facts()}


@settings(max_examples=80, deadline=None)
@given(sequences)
def test_what_sequences_begin_with_stands_in_a_tree_once(found):
    tree = TokenTree(found)
    beginnings = {tuple(s[: n + 1]) for s in found for n in range(len(s))}
    assert len(tree.tokens) == len(beginnings)
    for sequence, path in zip(found, tree.paths, strict=True):
        assert [tree.tokens[node] for node in path] == sequence
        assert [tree.positions[node] for node in path] == list(range(len(sequence)))


@settings(max_examples=80, deadline=None)
@given(sequences)
def test_each_token_sees_those_before_it_and_itself(found):
    tree, asked = TokenTree(found), []
    before = {node: set(path[: n + 1]) for path in tree.paths for n, node in enumerate(path)}
    for queries, keys, seen, lengths in tree_rectangles(tree):
        assert int(seen.min()) >= 1  # no softmax over nothing
        for row, length in enumerate(lengths.tolist()):
            for place, node in enumerate(queries[row, :length].tolist()):
                nodes = keys[row, : seen[row, place]].tolist()
                assert len(nodes) == len(set(nodes)) and set(nodes) == before[node]
                asked.append(node)
    assert sorted(asked) == list(range(len(tree.tokens)))


def test_rectangles_stay_small_and_little_of_them_is_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = [*torch.randint(5, 40, (90,), generator=generator).tolist(), 700, 300, 650, 90]
    rows = [torch.randint(3, 99, (n,), generator=generator).tolist() for n in lengths]
    found = tree_rectangles(TokenTree([[1, 2, *row] for row in rows]))
    areas = [r.queries.numel() * r.keys.shape[1] for r in found]
    useful = sum(int(n) * (int(n) + 2) for n in lengths)
    assert max(areas[:-2]) <= MAX_SCORES and useful / sum(areas) > 0.6
    assert len(found) < 16


@pytest.mark.parametrize("limit", [tree_attention.MAX_SCORES, 0])
def test_a_tree_gives_what_each_sequence_gives_alone(lm, limit, monkeypatch):
    monkeypatch.setattr(tree_attention, "MAX_SCORES", limit)  # 0: by the fused kernel
    tree = TokenTree([*FORKS, FORKS[1]])
    attention = TreeAttention(tree_rectangles(tree), len(tree.tokens))
    before = lm.model.config._attn_implementation
    with torch.no_grad(), edited(lm.architecture, plan_of(lm, 1)):
        tokens = torch.tensor([tree.tokens, tree.tokens])
        both = run_tree(lm, tokens, torch.tensor(tree.positions), attention)
        for sequence, path in zip([*FORKS, FORKS[1]], tree.paths, strict=True):
            alone = lm.body(input_ids=torch.tensor([sequence])).last_hidden_state[0]
            for ours in both[:, list(path)]:
                torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-4)
    assert lm.model.config._attn_implementation == before


@pytest.mark.parametrize("tokens", [4, 9, 1000])
def test_forced_states_are_those_of_rectangles(lm, tokens):
    batches = ForcedBatches(FORCED, 2, tree_tokens=tokens)
    for batch in batches.batches:
        alone = len(set(batch.target.tolist())) == max(len(a) for a in RESPONSES)
        assert batch.tokens.numel() <= tokens or alone or len(batches.batches) == len(FORCED)
    ours = run_forced(lm, batches)[0]
    torch.testing.assert_close(ours, forced_hidden_states(lm, FORCED, 2), rtol=1e-3, atol=1e-4)


def test_candidates_run_together_as_far_as_they_fit():
    assert ForcedBatches(FORCED, 2).candidates_at_once(7) == 7
    whole = len(TokenTree([s.fed for s in FORCED]).tokens)
    assert ForcedBatches(FORCED, 2, tree_tokens=3 * whole).candidates_at_once(7) == 3
    assert ForcedBatches(FORCED, 2, tree_tokens=3 * whole).candidates_at_once(2) == 2
    assert ForcedBatches(FORCED, 2, tree_tokens=whole).candidates_at_once(7) == 1
    assert ForcedBatches(FORCED, 2, tree_tokens=1).candidates_at_once(7) == 1


@pytest.mark.parametrize(("name", "reason"), REASONS.items(), ids=list(REASONS))
def test_models_that_cannot_run_trees_are_found_out(name, reason, tmp_path):
    found = load(name, tmp_path).capabilities.tree_problem
    assert found is None if reason is None else found.startswith(reason)


def test_a_layer_that_mixes_neighbours_is_found_out(tmp_path):
    lm = load("llama", tmp_path)

    def mix(_module, _inputs, output):
        return output + 0.2 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    lm.architecture.layers[0].mlp.register_forward_hook(mix)
    assert find_capabilities(lm).tree_problem.startswith("hidden states differ by ")


def test_attention_of_an_unknown_kind_is_not_replaced(tmp_path, monkeypatch):
    lm = load("llama", tmp_path)
    forward = type(lm.architecture.layers[0].self_attn).forward

    def biased(self, *args, **kwargs):
        return forward(self, *args, **kwargs, position_bias=torch.zeros(1))

    monkeypatch.setattr(type(lm.architecture.layers[0].self_attn), "forward", biased)
    assert find_capabilities(lm).tree_problem == "its attention takes position_bias"
    assert lm.model.config._attn_implementation != tree_attention.NAME


def test_prompts_longer_than_a_window_run_in_rectangles(tmp_path):
    model = zoo.tiny_model("gemma2")
    for config in (model.config, *(m.config for m in model.modules() if hasattr(m, "config"))):
        config.sliding_window = 20
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = load_tiny_model(tmp_path)
    engine, plan = Engine(lm, batch_size=4), plan_of(lm, 1)
    assert lm.capabilities.tree_problem is None
    words = "how do I make a cake please tell me about the weather in Rome".split()
    for count, trees in ((3, True), (14, False)):
        prompts = (Prompt(" ".join(words[:count])), Prompt(" ".join(words[1:count])))
        request = TeacherForcedRequest(prompts, 3, row_statistics)
        (ours,) = engine.measure(plan, [request])
        (plain,) = Engine(lm.limited(tree_problem="off"), batch_size=4).measure(plan, [request])
        torch.testing.assert_close(ours.columns.values, plain.columns.values, rtol=1e-3, atol=1e-7)
        (passes,) = [t.passes for k, t in engine._forced._together.items() if k[0][0] == prompts]
        assert (passes._laid_out().batches.batches[0].tree is not None) == trees

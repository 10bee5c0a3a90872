"""The census: tiny models of every family, their stages, and the table of a record."""

from contextlib import contextmanager

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.families import census, examine
from benchmarks.families.tiny_configs import VOCABULARY, tiny_config
from tests.helpers.records import shown, table_rows
from trainer.errors import UserError
from trainer.evaluation.generation import stock_attention
from trainer.model import pack_context

TRIED = {  # family: how its packs run
    "llama": "fused",
    "gpt_neox": "packed",
    "bloom": "one by one",
    "bert": "refused",
}


def made(**outcomes):
    """A record of families given as (mode, why, stages)."""
    rows = [{"line": family, "mode": mode, "why": why, "operations": {}, "logits": 1e-7, "gradients": 2e-7,
             "stages": {"make": "ok", "pack": "ok", "lora": "ok", "qlora": "ok", "full": "ok"} | stages}
            for family, (mode, why, stages) in outcomes.items()]
    return {"suite": "families-cpu", "time": "2026-12-01T10:00:00+00:00", "commit": "0123456789", "dirty": False, "command": "python -m x",
            "versions": {"transformers": "5.19.0"}, "agreement": {"logits": 1e-7, "gradients": 2e-7}, "summary": rows,
            "conditions": {"left_out": {"bart": "translates"}, "minutes": 5.0, "workers": 2, "threads": 1}}


@pytest.mark.slow
@pytest.mark.parametrize("family", TRIED)
def test_a_family_goes_through_every_stage(family):
    row = examine.examine(family)
    assert census.outcome(row) == TRIED[family], row["stages"]
    if TRIED[family] == "refused":
        assert row["stages"]["pack"].startswith("refused: model: expected a head that is a linear layer")
    else:
        assert row["stages"] == dict.fromkeys(("make", "pack", "generate", "bf16", *examine.METHODS), "ok")
        assert row["logits"] < examine.TOLERANCE and row["gradients"] < examine.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("family", "operation"), [("gpt_oss", "packed (tiles)"), ("got_ocr2", "packed (tiles)")])
def test_a_patched_model_generates_with_the_attention_that_its_class_has(tmp_path, family, operation):
    """gpt-oss has none by torch's scaled_dot_product_attention; the wrapper GOT-OCR2 names another than its text model."""
    examine.save_loud_model(family, tmp_path)
    _, report = examine.build_model(examine.config_of(tmp_path, "full"), examine.CPU)
    assert report.backends["attention"] == operation
    examine.compare_generation(tmp_path)


@pytest.mark.slow
def test_other_tokens_than_stock_ones_fail_the_census(tmp_path, monkeypatch):
    examine.save_loud_model("llama", tmp_path)

    @contextmanager
    def spoilt(model):
        with stock_attention(model) as base:
            base.lm_head.weight.data.neg_()
            yield base

    monkeypatch.setattr(examine, "stock_attention", spoilt)
    with pytest.raises(examine.Wrong, match="other tokens"):
        examine.compare_generation(tmp_path)


@pytest.mark.slow
def test_attention_that_sees_other_samples_fails_the_census(monkeypatch):
    """Samples of a pack that see each other are a wrong result, not a refusal."""
    inside = pack_context.packed_attention
    monkeypatch.setattr(pack_context, "packed_attention",
                        lambda q, k, v, cu, most, **options: inside(q, k, v, cu[[0, -1]], int(cu[-1]), **options))
    monkeypatch.setattr("trainer.model.loading.probe_packing", lambda model: None)
    row = examine.examine("gpt_neox")
    assert row["stages"]["pack"].startswith("wrong: logits of a pack differ")
    assert census.outcome(row) == "fails" and census.status({"summary": [row]}) == 1


@pytest.mark.slow
def test_every_family_has_a_tiny_model():
    """Of families that the census tries, except models that also see, whose parts take longer."""
    names = [name for name in census.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not census.left_out(name)]
    for name in names:
        config = tiny_config(name)
        assert config.get_text_config().vocab_size <= VOCABULARY, name
    assert len(names) > 100


def test_a_layer_of_each_kind_is_kept():
    kinds = {"gemma3_text": ["sliding_attention", "sliding_attention", "full_attention"], "lfm2": ["conv", "full_attention"],
             "qwen2": ["sliding_attention", "full_attention"], "qwen3_5_text": ["linear_attention", "linear_attention", "full_attention"]}
    for family, expected in kinds.items():
        config = tiny_config(family)
        assert config.layer_types == expected and config.num_hidden_layers == len(expected)
    assert tiny_config("llama", hidden_size=32).hidden_size == 32
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"))
    assert model.num_parameters() < 1e6


def test_the_table_groups_families_by_how_they_run_and_why():
    record = made(
        llama=("fused", None, {}), qwen3=("fused", None, {}), gpt2=("packed", None, {}),
        bamba=("one by one", "samples in one pack change each other, by 1.4e-01 of a token", {}),
        jamba=("one by one", "samples in one pack change each other, by 7.0e+00 of a token", {}),
        bert=(None, None, {"pack": "refused: model: found another head in bert; train another model"}),
        phimoe=("packed", None, {"pack": "wrong: logits differ by 4e-01"}),
        doge=("packed", None, {"lora": "refused: lora.rank: too large"}))
    lines = table_rows(record)
    assert lines[0] == "| a pack runs | why | families |"
    assert "| fused |  | llama, qwen3 |" in lines and "| packed |  | gpt2, doge |" in lines
    assert "| one by one | samples in one pack change each other | bamba, jamba |" in lines
    assert "| refused | model: found another head; train another model | bert |" in lines
    assert "| fails | pack: wrong: logits differ by 4e-01 | phimoe |" in lines
    text = shown(record)
    assert "8 families of transformers 5.19.0" in text and "2 one by one" in text and "within 1e-07 and 2e-07" in text
    assert "Refused by lora: doge (lora.rank: too large)." in text and "Not tried: bart (translates)." in text
    assert census.status(record) == 1 and census.status(made(llama=("fused", None, {}))) == 0


def test_unknown_families_are_refused():
    arguments = type("Arguments", (), {"families": ["llama", "lama"], "workers": 1})
    with pytest.raises(UserError, match="--families: expected model types of transformers, got lama; "):
        census.run(arguments)


def test_what_is_left_out_has_a_reason():
    assert census.left_out("bart") == census.left_out("musicgen") == "an encoder and a decoder"
    assert census.left_out("gemma4_assistant") and census.left_out("llama") is None
    named = {name for names in census.ELSEWHERE.values() for name in names.split()}
    assert named <= set(census.families()) and named <= set(CONFIG_MAPPING.keys())

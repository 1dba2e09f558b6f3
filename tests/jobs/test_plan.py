"""The planner's arithmetic: sizes, tokens, time, money and refusals, by formulas that are worked out by hand here."""

import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gemma import build
from torch import nn

from actlake.ingest.models import ModelRef, ModelShape, model_shape
from actlake.jobs.jobfile import CaptureOptions, CorpusOptions, Job, LayoutOptions, parse_job
from actlake.jobs.plan import workload
from actlake.jobs.plan.budget import check
from actlake.jobs.plan.changes import advice, cheapest_change
from actlake.jobs.plan.estimate import Estimate, Setting, changed, estimate
from actlake.jobs.plan.machine import Machine, choose_machine, memory_here
from actlake.jobs.plan.memory import worker_memory
from actlake.jobs.plan.money import Cost, store_or_recompute
from actlake.jobs.plan.options import BudgetOptions, PlanOptions
from actlake.jobs.plan.rates import read_rates
from actlake.jobs.plan.release import plan_release
from actlake.jobs.plan.sizes import sizes_of
from actlake.jobs.plan.stages import ramped_seconds
from actlake.jobs.plan.summary import paragraph
from actlake.jobs.plan.transformer import block_parameters, embedding_parameters, flops_per_token
from actlake.jobs.planning import plan_spec
from actlake.storage.clients import AMAZON, AZURE, GOOGLE
from actlake.storage.errors import BadInputError, JobFileError, UnknownNameError
from actlake.storage.row_index import RowIndex
from actlake.storage.rowspace import KeepRule
from actlake.storage.spec import DatasetSpec

RATES = read_rates()
ON_GCS = PlanOptions(machine="a3-highgpu-8g")


def job_of(model: str = "google/gemma-3-270m", **changes: Any) -> Job:
    values: dict[str, Any] = {
        "dataset": "gs://bucket/ds",
        "model": model,
        "preset": "gemma-scope-2",
        "max_rows": 1_000_000,
        "corpus": CorpusOptions(sources=("texts/*.jsonl",), holdout=0.0),
        "plan": ON_GCS,
    }
    return Job(**(values | changes))


def spec_of(job: Job) -> DatasetSpec:
    ref = ModelRef(name=job.model, revision=None, path="", fingerprint="")
    return plan_spec(job, model=ref, shape=model_shape(job.model), corpus_id="", keep=KeepRule(), split="train")


def made(job: Job, **setting: Any) -> Estimate:
    """Plan a job over full sequences of 1,024 tokens."""
    spec = spec_of(job)
    found = workload.assumed(job, spec, n_text_tokens=None, document_tokens=1023, known_from="the test")
    values: dict[str, Any] = {
        "machine": choose_machine(job.plan, RATES),
        "store_name": "gcs",
        "rates": RATES,
        "ratios": {},
        "ratios_from": "the table",
    }
    return estimate(job, spec, model_shape(job.model), found, Setting(**(values | setting)))


# --- the model ----------------------------------------------------------------------------------------------------


def shape_of(model: nn.Module, config: Any) -> ModelShape:
    return ModelShape(
        architecture="Gemma3ForCausalLM",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_attn_z=config.num_attention_heads * config.head_dim,
        d_kv=config.num_key_value_heads * config.head_dim,
        d_ff=config.intermediate_size,
        context_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )


def test_parameters_and_operations_are_those_of_a_real_model() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = build("Gemma3ForCausalLM")
    text: Any = model.get_submodule("model")
    shape = shape_of(text, text.config)
    matrices = sum(m.weight.numel() for m in text.layers.modules() if isinstance(m, nn.Linear))
    assert block_parameters(shape) == matrices
    assert embedding_parameters(shape) == text.embed_tokens.weight.numel()
    n_tokens = 8
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        text(input_ids=torch.zeros((1, n_tokens), dtype=torch.int64), use_cache=False)
    by_operator = counted.get_flop_counts()["Global"]
    products = sum(n for operator, n in by_operator.items() if "mm" in str(operator) and "bmm" not in str(operator))
    last = f"layers.{shape.n_layers - 1}.resid_post"
    assert products == n_tokens * flops_per_token(shape, (last,), 0)


def test_operations_end_at_the_deepest_hook_point() -> None:
    shape = model_shape("google/gemma-3-27b-pt")
    whole = flops_per_token(shape, ("layers.61.resid_post",), 1024)
    assert whole == 2 * block_parameters(shape) + 4 * 62 * 4096 * 512
    assert flops_per_token(shape, ("layers.0.resid_pre",), 1024) == 0
    assert flops_per_token(shape, ("layers.30.resid_post", "layers.2.mlp_in"), 1024) == pytest.approx(whole / 2)
    attention = 2 * 2 * 5376 * (4096 + 2048) + 4 * 4096 * 512
    assert flops_per_token(shape, ("layers.0.attn_z",), 1024) == attention
    assert flops_per_token(shape, ("layers.0.mlp_in",), 1024) == attention
    assert flops_per_token(shape, ("layers.0.mlp_out",), 1024) == attention + 2 * 3 * 5376 * 21_504


# --- the release --------------------------------------------------------------------------------------------------


def test_the_release_is_110_petabytes() -> None:
    found = plan_release(
        "gemma-scope-2",
        tokens_base=8_000_000_000,
        tokens_chat=3_000_000_000,
        dtype="float32",
        options=ON_GCS,
        rates=RATES,
    )
    assert found.nbytes == 2_503_680 * 4 * 11_000_000_000
    assert f"{found.nbytes / 1e15:.1f}" == "110.2"
    assert len(found.rows) == 10 * 4
    # facts of the models, bfloat16: kB a token over four streams and all layers
    per_token = dict.fromkeys(("270m", "1b", "4b", "12b", "27b"), 0)
    for row in found.rows:
        per_token[row.model.split("-")[2]] += row.nbytes_per_token // 2 // 2  # base and chat; float32 to bfloat16
    assert {model: round(n / 1000) for model, n in per_token.items()} == {
        "270m": 106,
        "1b": 233,
        "4b": 662,
        "12b": 1499,
        "27b": 2508,
    }
    ratios = RATES.ratios["bfloat16"]
    expected = sum(row.nbytes / 2 / ratios[row.stream] for row in found.rows)
    assert found.stored == pytest.approx(expected, rel=1e-3)


def test_a_release_that_is_not_known_is_refused() -> None:
    def ask(name: str = "gemma-scope-2", dtype: str = "float32", tokens: int = 1) -> None:
        plan_release(name, tokens_base=tokens, tokens_chat=0, dtype=dtype, options=ON_GCS, rates=RATES)

    with pytest.raises(UnknownNameError, match="did you mean 'gemma-scope-2'"):
        ask(name="gemma-scope-3")
    with pytest.raises(BadInputError, match="bfloat16, float32"):
        ask(dtype="float64")
    with pytest.raises(BadInputError, match="give one above 0"):
        ask(tokens=0)


# --- sizes and tokens ---------------------------------------------------------------------------------------------


def test_sizes_count_every_object_and_chunk() -> None:
    spec = spec_of(job_of(layout=LayoutOptions(rows_per_shard=4096, rows_per_chunk=1024)))
    found = sizes_of(spec, {"train": 10_000, "heldout": 5}, lambda name: 2.0)
    assert (found.n_shards, found.total_rows) == (4, 10_005)
    assert {array.n_objects for array in found.arrays} == {4}
    assert {array.n_chunks for array in found.arrays} == {11}
    assert found.n_objects == (72 + 4) * 4 + 2 * 4
    assert found.raw_nbytes == 10_005 * spec.nbytes_per_row
    overhead = 11 * (4 + 16) + 4 * (16 * 4 + 4)
    (point,) = (array for array in found.arrays if array.name == "layers.3.attn_z")
    assert point.nbytes == 10_005 * 2048 // 2 + overhead
    assert found.by_stream()["attn_z"] == (18, 18 * point.raw_nbytes, 18 * point.nbytes)


def test_without_compression_nothing_gets_smaller() -> None:
    found = made(job_of(layout=LayoutOptions(codec="none"))).sizes
    assert found.raw_nbytes < found.nbytes < 1.001 * found.raw_nbytes


def test_sequences_across_a_boundary_are_counted_once_for_each() -> None:
    index = RowIndex(np.array([0, 3, 8, 10, 10, 20], dtype=np.int64))
    assert workload.straddling_rows(index, 5, 20) == 5 + 10  # 3..8 at row 5, 10..20 at row 15; 10 begins one
    assert workload.straddling_rows(index, 10, 20) == 0
    assert workload.straddling_rows(index, 20, 20) == 0


def test_full_sequences_need_no_padding_and_one_token_of_a_thousand_is_bos() -> None:
    found = made(job_of(max_rows=1_047_552)).workload
    assert (found.n_rows, found.n_padding) == ({"train": 1_047_552}, 0)
    assert found.n_tokens == 1_048_576
    # 131,072 rows a shard: 7 boundaries, 1,022 of 1,023 of them inside a sequence
    assert found.n_straddling == round(7 * 1022 / 1023 * 1024)


def test_what_limits_the_rows() -> None:
    def rows(job: Job, n_text: float | None) -> dict[str, int]:
        spec = spec_of(job)
        return dict(
            workload.assumed(job, spec, n_text_tokens=n_text, document_tokens=1023, known_from="the test").n_rows
        )

    corpus = CorpusOptions(sources=("a",), holdout=0.1)
    assert rows(job_of(max_rows=None, corpus=corpus), 1_023_000) == {"train": 920_700, "heldout": 102_300}
    assert rows(job_of(max_rows=900, corpus=corpus), 1_023_000) == {"train": 900, "heldout": 100}
    cut = replace(corpus, max_tokens=102_400)
    assert rows(job_of(max_rows=None, corpus=cut), 1_023_000) == {"train": 102_300, "heldout": 102_300}


# --- time ---------------------------------------------------------------------------------------------------------


def test_requests_take_as_long_as_a_rate_that_doubles_allows() -> None:
    assert ramped_seconds(1_200_000, 1000, 1200) == 1200
    assert ramped_seconds(1_200_000 + 2000 * 600, 1000, 1200) == 1200 + 600
    assert ramped_seconds(1_200_000 + 2_400_000 + 4000, 1000, 1200) == 2401
    assert ramped_seconds(7000, 3500, None) == 2


def test_stages_follow_from_the_rates() -> None:
    plan = made(job_of())
    stages = plan.stages
    raw = plan.sizes.raw_nbytes
    assert stages.forward == pytest.approx(plan.workload.n_run * plan.flops_per_token / (8 * 989e12 * RATES.mfu))
    assert stages.host == pytest.approx(raw / (8 * 64e9 * 0.8))
    assert stages.encode == pytest.approx(raw / 1e9 * 7.1 / 208)
    assert stages.nic == pytest.approx(plan.sizes.nbytes / 25e9)
    assert stages.store == pytest.approx(plan.sizes.n_objects / 1000)
    assert stages.total == stages.encode
    assert stages.binding == "encode"
    unpacked = made(job_of(layout=LayoutOptions(codec="none")))
    assert unpacked.stages.encode == pytest.approx(raw / 1e9 * 2.2 / 208)
    assert unpacked.stages.binding == "nic"
    assert stages.idle == pytest.approx(1 - stages.forward / stages.encode)
    assert plan.gpu_hours == pytest.approx(stages.total / 3600 * 8)


def test_without_gpus_forward_and_encode_share_the_cores() -> None:
    machine = Machine(name="cpu", count=1, gpu=None, n_gpus=0, n_cpus=4, memory=2**36, nic=None, hour=0.0, spot=False)
    stages = changed(made(job_of()), machine=machine).stages
    assert stages.total == pytest.approx(stages.forward + stages.encode)
    assert stages.host == 0


def test_measured_tokens_a_second_replace_the_rates_and_half_the_rows_take_half_the_time() -> None:
    plan = made(job_of(), tokens_per_s=1000.0)
    assert plan.stages.forward == pytest.approx(plan.workload.n_run / 8000)
    half = made(job_of(), tokens_per_s=1000.0, n_rows_left=500_000)
    assert half.stages.forward == pytest.approx(plan.stages.forward / 2)
    assert half.cost.compute == pytest.approx(plan.cost.compute / 2)
    assert half.cost.month == plan.cost.month


def test_machines_share_the_work_and_the_bill_stays() -> None:
    one, four = made(job_of()), made(job_of(plan=replace(ON_GCS, machines=4)))
    assert four.stages.total == pytest.approx(one.stages.total / 4)
    assert four.cost.compute == pytest.approx(one.cost.compute)


def test_keys_of_the_job_replace_what_the_rates_say_of_a_machine() -> None:
    options = PlanOptions(machine="a3-highgpu-8g", gpu="a100", gpus=2, cpus=10, memory=2**30, nic=10**9, hour=1.5)
    machine = choose_machine(options, RATES)
    assert (machine.gpu, machine.n_gpus, machine.n_cpus) == (RATES.gpus["a100"], 2, 10)
    assert (machine.memory, machine.nic, machine.hour) == (2**30, 10**9, 1.5)
    here = choose_machine(PlanOptions(), RATES, device="cpu")
    assert (here.name, here.gpu, here.n_gpus, here.memory) == ("here", None, 0, memory_here())
    assert choose_machine(replace(ON_GCS, spot=True), RATES).hour < choose_machine(ON_GCS, RATES).hour
    with pytest.raises(JobFileError, match="of which kind"):
        choose_machine(PlanOptions(gpus=2), RATES, device="cpu")
    with pytest.raises(UnknownNameError, match="did you mean 'a3-highgpu-8g'"):
        choose_machine(PlanOptions(machine="a3-highgpu-4g"), RATES)
    with pytest.raises(UnknownNameError, match="no GPU 'h300'"):
        choose_machine(replace(ON_GCS, gpu="h300"), RATES)


# --- money --------------------------------------------------------------------------------------------------------


def test_prices_are_those_of_the_table() -> None:
    plan = made(job_of())
    gib = plan.sizes.nbytes / 2**30
    assert plan.cost.month == pytest.approx(gib * 0.020)
    assert plan.cost.egress == pytest.approx(gib * 0.12)
    assert plan.cost.n_class_a == plan.sizes.n_objects + 76 + 4
    assert plan.cost.requests == pytest.approx(plan.cost.n_class_a * 5e-6)
    assert plan.cost.read == pytest.approx((plan.sizes.n_chunks + plan.sizes.n_objects) * 4e-7)
    assert plan.cost.compute == pytest.approx(plan.stages.total / 3600 * 87.83)


def test_where_parts_are_billed_large_objects_take_many_requests() -> None:
    job = job_of(max_rows=131_072, storage_options={"part_nbytes": 2**26})
    one, parts = made(job).cost, made(job, store_name="s3").cost
    sizes = made(job).sizes
    (attn_z, mlp_in) = (next(a for a in sizes.arrays if a.name == f"layers.0.{s}") for s in ("attn_z", "mlp_in"))
    assert 2 * 2**26 < attn_z.nbytes < 3 * 2**26
    assert 2**26 < mlp_in.nbytes < 2 * 2**26
    # What is smaller than two parts is one request.
    assert parts.n_class_a - one.n_class_a == 18 * (3 + 1)


def test_azures_client_has_parts_of_its_own() -> None:
    job = job_of(max_rows=131_072, storage_options={"part_nbytes": 2**26})
    one, parts = made(job), made(job, store_name="az")
    large = [array for array in one.sizes.arrays if array.nbytes > 2**26]
    assert 0 < len(large) < len(one.sizes.arrays)
    assert parts.cost.n_class_a - one.cost.n_class_a == sum(math.ceil(array.nbytes / 2**22) for array in large)
    assert parts.cost.month == pytest.approx(parts.sizes.nbytes / 2**30 * 0.0208)


@pytest.mark.parametrize("protocol", [*GOOGLE, *AMAZON, *AZURE])
def test_every_bucket_has_a_price_and_is_held_against_the_budget(protocol: str) -> None:
    name, rates = RATES.store(protocol)
    assert name != "local"
    assert rates.writes_per_s is not None
    here = PlanOptions(machine="a3-highgpu-8g", hour=0.0, months=12.0)
    with pytest.raises(JobFileError, match=r"budget\.max_cost"):
        check(made(job_of(plan=here, budget=BudgetOptions(max_cost=1.0)), store_name=name))
    assert made(job_of(plan=here), store_name=name).memory.encoded == made(job_of(plan=here)).memory.encoded


def verdict(pass_cost: float, alone_cost: float, read: float = 0.0, reads: float = 1.0) -> Any:
    cost = Cost(compute=10, requests=2, month=4, read=read, egress=0, n_class_a=0, n_class_b=0)
    return store_or_recompute(cost, pass_cost=pass_cost, alone_cost=alone_cost, pass_hours=1, months=2, reads=reads)


def test_storing_pays_from_the_read_that_makes_up_for_it() -> None:
    found = verdict(pass_cost=3, alone_cost=40)
    assert (found.at_once, found.one_by_one) == (7, 0.5)  # kept: 10 + 2 + 2 months of 4
    assert (found.stored_cost, found.recomputed_cost, found.store) == (20, 40, True)
    assert found.sentence().startswith("store.")


def test_what_is_dearer_to_keep_than_to_run_is_not_to_be_stored() -> None:
    found = verdict(pass_cost=1, alone_cost=4, read=1.0, reads=3.0)
    assert (found.at_once, found.stored_cost, found.recomputed_cost, found.store) == (None, 23, 12, False)
    assert found.sentence().startswith("DO NOT STORE")
    assert "never where one pass" in found.sentence()
    assert "no price" in verdict(pass_cost=0, alone_cost=0).sentence()


def test_the_cheapest_change_is_the_one_that_saves_most() -> None:
    wasteful = made(job_of(capture=CaptureOptions(dtype="float32"), plan=replace(ON_GCS, spot=True, months=12.0)))
    best = cheapest_change(wasteful)
    assert best is not None
    assert best.text == "capture.dtype = 'bfloat16'"
    assert best.saved > wasteful.cost.month
    dear = made(job_of(plan=replace(ON_GCS, months=0.0)))
    found = cheapest_change(dear)
    assert found is not None
    assert "spot" in found.text
    assert f"the limit is {'encode'}" in advice(dear)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_budget_of_bytes_is_kept_by_the_rows_that_the_refusal_names() -> None:
    budget = BudgetOptions(max_bytes=50_000_000_000)
    with pytest.raises(JobFileError, match=r"budget.max_bytes is 50,000,000,000; max_rows = 655_360 fits") as refused:
        check(made(job_of(budget=budget)))
    assert f"would store {made(job_of()).sizes.nbytes:,} bytes" in str(refused.value)
    check(made(job_of(budget=budget, max_rows=655_360)))
    with pytest.raises(JobFileError):
        check(made(job_of(budget=budget, max_rows=655_360 + 131_072)))


def test_a_budget_of_dollars_counts_computing_and_storage() -> None:
    plan = made(job_of())
    total = plan.cost.total(1)
    check(made(job_of(budget=BudgetOptions(max_cost=total * 1.001))))
    with pytest.raises(JobFileError, match=rf"would cost \${total:,.2f}.*max_rows = 524_288 fits"):
        check(made(job_of(budget=BudgetOptions(max_cost=total * 0.6))))
    check(made(job_of(budget=BudgetOptions(max_cost=total * 0.6), max_rows=524_288)))


def test_too_little_memory_is_refused_with_the_largest_shard_that_fits() -> None:
    small = replace(ON_GCS, gpus=1, memory=10 * 2**30)
    with pytest.raises(JobFileError, match=r"layout.rows_per_shard = 16_384 fits") as refused:
        check(made(job_of(plan=small)))
    assert "1 worker(s) would take" in str(refused.value)
    check(made(job_of(plan=small)), memory=False)
    check(made(job_of(plan=small, layout=LayoutOptions(rows_per_shard=16_384))))


@pytest.mark.parametrize("gib", [100, 200, 420])
def test_where_weights_on_their_way_bind_fewer_workers_are_named(gib: int) -> None:
    """No shard of a 27B model takes more memory of its worker than its weights do as they are loaded."""
    job = job_of("google/gemma-3-27b-pt", plan=replace(ON_GCS, memory=gib * 2**30))
    with pytest.raises(JobFileError, match=r"run.workers = (\d) fits$") as refused:
        check(made(job))
    n_workers = int(str(refused.value).split("run.workers = ")[1][0])
    check(made(replace(job, run=replace(job.run, workers=n_workers))))
    with pytest.raises(JobFileError, match=f"run.workers = {n_workers} fits"):
        check(made(replace(job, run=replace(job.run, workers=n_workers + 1))))


@pytest.mark.parametrize("max_cost", [1_000, 100, 2])
def test_a_bucket_that_warms_up_counts_in_the_rows_that_are_named(max_cost: float) -> None:
    job = job_of(max_rows=8_000_000_000, plan=replace(ON_GCS, machines=32, months=0.0))
    job = replace(job, budget=BudgetOptions(max_cost=max_cost))
    with pytest.raises(JobFileError, match=r"max_rows = [\d_]+ fits") as refused:
        check(made(job))
    n_rows = int(str(refused.value).split("max_rows = ")[1].split(" ")[0])
    check(made(replace(job, max_rows=n_rows)))
    with pytest.raises(JobFileError):
        check(made(replace(job, max_rows=n_rows + 2 * 131_072)))


def test_where_one_shard_fits_and_two_do_not_the_advice_says_so() -> None:
    layout = LayoutOptions(rows_per_shard=65_536)
    plan = made(job_of(layout=layout))
    room = plan.memory.host - plan.memory.shard // 3
    small = replace(ON_GCS, gpus=1, memory=room)
    with pytest.raises(JobFileError, match=r"room for one shard, a worker has 2 in the making: .* = 32_768 fits"):
        check(made(job_of(plan=small, layout=layout)))
    check(made(job_of(plan=small, layout=layout, max_rows=60_000)))  # a single shard
    passes = LayoutOptions(rows_per_shard=65_536, shard_memory=plan.passes.nbytes - 1)
    tiny = replace(small, memory=plan.memory.host - plan.memory.shard * 3 // 4)
    with pytest.raises(JobFileError, match=r"layout.shard_memory = '\d+MiB' fits, with more passes"):
        check(made(job_of(plan=tiny, layout=passes)))


def test_a_model_that_does_not_fit_its_gpu_is_refused() -> None:
    job = job_of("google/gemma-3-27b-pt", plan=replace(ON_GCS, gpu="l4"))
    with pytest.raises(JobFileError, match=r"GPU, which has 24 GB; .* \(h200"):
        check(made(job))


def test_passes_are_proposed_where_shards_are_small() -> None:
    assert made(job_of()).passes.n == 1
    assert made(job_of()).proposed is None
    wide = made(job_of("google/gemma-3-27b-pt"))
    assert (wide.spec.rows_per_shard, wide.passes.n, wide.passes.forward) == (4096, 1, 1.0)
    proposed = wide.proposed
    assert proposed is not None
    assert proposed.n == -(-32_768 * wide.spec.nbytes_per_row // 2**34)
    # Layers 62, 50, 38, ... : each pass runs as far as its own deepest hook point.
    assert 0.5 * proposed.n < proposed.forward < 0.65 * proposed.n
    taken = made(job_of("google/gemma-3-27b-pt", layout=LayoutOptions(rows_per_shard=32_768)))
    assert (taken.passes, taken.proposed) == (proposed, None)
    per_token = [plan.stages.forward / plan.workload.n_run for plan in (taken, wide)]
    assert per_token[0] == pytest.approx(proposed.forward * per_token[1])
    assert proposed.nbytes <= 2**34
    # On their way to the GPU the weights take more of the host's memory than two shards do.
    assert taken.memory.shard > 2 * proposed.nbytes


def test_passes_are_not_proposed_where_they_would_change_nothing() -> None:
    wide = job_of("google/gemma-3-27b-pt")
    assert made(wide).proposed is not None
    # Fewer rows than a shard has: larger shards would be the same one.
    assert made(replace(wide, max_rows=4000)).proposed is None
    # What is there keeps its layout.
    assert made(wide, n_rows_left=500_000).proposed is None


def test_the_memory_of_a_shard_is_no_part_of_a_dataset_whose_rows_per_shard_are_given() -> None:
    specs = [spec_of(job_of(layout=LayoutOptions(rows_per_shard=4096, shard_memory=n))) for n in (2**26, 2**34)]
    assert specs[0].dataset_id == specs[1].dataset_id
    with pytest.raises(JobFileError, match=r"= 65,536 rows of the widest hook point, .* use rows_per_shard = 16,384"):
        spec_of(job_of(layout=LayoutOptions(rows_per_shard=65_536, shard_memory=2**26)))


# --- memory, words ------------------------------------------------------------------------------------------------


def test_memory_counts_weights_shard_and_batch() -> None:
    job = job_of(layout=LayoutOptions(rows_per_shard=4096))
    spec, shape = spec_of(job), model_shape(job.model)
    values: dict[str, Any] = {"shard_rows": 4096, "encoded": 7, "context_length": 1024, "widened": False}
    values["pass_nbytes"] = 4096 * spec.nbytes_per_row
    on_cpu = worker_memory(spec, shape, on_gpu=False, **values)
    assert on_cpu.shard == 2 * 4096 * spec.nbytes_per_row
    assert worker_memory(spec, shape, on_gpu=False, n_shards=1, **values).shard == 4096 * spec.nbytes_per_row
    assert (on_cpu.encoded, on_cpu.gpu) == (7, 0)
    assert on_cpu.host == sum(on_cpu.parts().values())
    widened = worker_memory(spec, shape, on_gpu=False, **(values | {"widened": True}))
    assert widened.model - on_cpu.model == 4 * block_parameters(shape)
    on_gpu = worker_memory(spec, shape, on_gpu=True, **values)
    weights = 2 * (block_parameters(shape) + embedding_parameters(shape))
    assert (on_gpu.model, on_gpu.gpu > weights) == (0, True)


def test_the_paragraph_names_what_matters() -> None:
    text = paragraph(made(job_of()))
    for part in ("1,000,000 rows in 8 shards", "8 worker(s)", "encode binds", "$"):
        assert part in text


def test_the_job_file_takes_a_plan_and_a_budget() -> None:
    table = {
        "dataset": "d",
        "model": "m",
        "preset": "clt",
        "corpus": {"sources": ["a"]},
        "plan": {"machine": "a3-highgpu-8g", "nic": "25GB", "memory": "1 TiB", "spot": True, "months": 3},
        "budget": {"max_bytes": "2 TB", "max_cost": 500},
    }
    job = parse_job(table)
    assert (job.plan.nic, job.plan.memory, job.plan.months) == (25 * 10**9, 2**40, 3.0)
    assert (job.budget.max_bytes, job.budget.max_cost) == (2 * 10**12, 500.0)
    for changes, message in (
        ({"plan": {"mfu": 40}}, "share of the peak"),
        ({"plan": {"machines": 0}}, "plan.machines = 0"),
        ({"plan": {"tokens_per_s": 0.0}}, "above 0"),
        ({"plan": {"months": -1}}, "plan.months"),
        ({"budget": {"max_cost": 0}}, "budget.max_cost"),
        ({"budget": {"max_bytes": "many"}}, "budget.max_bytes = 'many'"),
        ({"budget": {"max_byte": 1}}, "did you mean 'max_bytes'"),
    ):
        with pytest.raises(BadInputError, match=message):
            parse_job(table | changes)


# --- rates --------------------------------------------------------------------------------------------------------


def test_rates_have_sources_and_dates_and_are_checked(tmp_path: Path) -> None:
    every: list[Any] = [*RATES.gpus.values(), *RATES.machines.values(), *RATES.stores.values(), RATES.cpu]
    assert all(entry.source and entry.date.startswith("20") for entry in every)
    assert RATES.store("gs")[0] == "gcs"
    assert RATES.store("s3")[0] == "s3"
    assert RATES.store("memory") == ("local", RATES.stores["local"])
    assert RATES.gpu_named("NVIDIA H100 80GB HBM3") == "h100"
    assert RATES.gpu_named("Radeon") is None
    text = (files("actlake.jobs.plan") / "rates.toml").read_text()
    other = tmp_path / "rates.toml"
    other.write_text(text.replace("gib_month = 0.020", "gib_month = 0.5"))
    assert read_rates(other).stores["gcs"].gib_month == 0.5
    for old, new, message in (
        ("gib_month = 0.020", "gib_mont = 0.020", "did you mean 'gib_month'"),
        ("gib_month = 0.020", "gib_month = -1", "must not be negative"),
        ('gpu = "h100"', 'gpu = "h101"', "is none of"),
        ("mfu = 0.4", "", "mfu"),
        ("hour = 87.83\nspot_hour", "spot_hour", "machines.a3-highgpu-8g"),
    ):
        assert old in text
        other.write_text(text.replace(old, new, 1))
        with pytest.raises(BadInputError, match=message):
            read_rates(other)

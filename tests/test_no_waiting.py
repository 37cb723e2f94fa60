"""A step of training never waits for the device: nothing in it is read back, and nothing has a size that it decides."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, make_recipe
from hypothesis import given
from hypothesis import strategies as st
from pictures import EVERYTHING, make_samples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from offline_kd.data.blocks import BlockLoader
from offline_kd.data.label_sets import packed_bytes
from offline_kd.data.manifest import Dataset, Normalisation, Split
from offline_kd.data.packing import pack
from offline_kd.distill.checkpoint import Progress
from offline_kd.distill.loader import Loader, one_ahead
from offline_kd.distill.loop import Run, _Tally, train_step
from offline_kd.distill.loss import loss_batch, own_parts, term_weights
from offline_kd.distill.optimisation import make_optimizer
from offline_kd.distill.reader import Options, Reader, Source
from offline_kd.distill.sampler import Order, home_workers
from offline_kd.distill.student import Student, new_student
from offline_kd.distill.teacher_signal import Ensemble, TeacherSignal, ensemble_logits, said_of, stored_signal
from offline_kd.distill.training import distill, make_loader, source_of, training_images
from offline_kd.models.kd_layer import insert_kd_layer
from offline_kd.models.networks import build, normalise
from offline_kd.models.taps import TapPoint, put_vector_taps
from offline_kd.objectives import DatasetRows, example_terms, nkd
from offline_kd.objectives.crd import CRD
from offline_kd.objectives.decisions import SubclassTerm, subclass_decisions
from offline_kd.objectives.dtkd import DTKD
from offline_kd.objectives.term import LossBatch, Term
from offline_kd.store.codecs import klt_means
from offline_kd.store.codecs.codec import Codec, tensors_of
from offline_kd.store.codecs.f16 import Float16
from offline_kd.store.codecs.f32 import Float32
from offline_kd.store.codecs.int_ import Int
from offline_kd.store.codecs.klt import Klt
from offline_kd.store.codecs.klt_means import KltMeans
from offline_kd.store.codecs.likeliest import likeliest_by_torch
from offline_kd.store.codecs.topk import TopK
from offline_kd.store.codecs.whole import refined_by_torch, whole_by_torch
from offline_kd.store.decisions import unpack_probs
from offline_kd.store.opening import open_store
from offline_kd.store.rows import Rows
from offline_kd.support.constants import constant
from offline_kd.support.places import Folder
from offline_kd.views.epochs import view_groups
from offline_kd.views.random_resized_crop import RandomCrop
from offline_kd.views.render import render

BATCH, CLASSES, TEMPLATES, PER_CLASS = 6, 10, 12, 2
NORMALISATION = Normalisation(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
TERMS: dict[str, Term] = {
    **example_terms(),
    "dtkd, equal log-sum-exp": DTKD(term="dtkd", temperature=4, sharpness="logsumexp"),
}
WITHOUT_HEADS = {name: term for name, term in TERMS.items() if not term.needs.features}
CODECS = [
    Float32(),
    Float16(name="f16"),
    Int(name="int"),
    Int(name="int", bits=4, exact_top=3),
    TopK(name="topk", k=5, tail_temperature=4),
    Klt(name="klt", refine=8, fit_rows=64),
    KltMeans(name="klt_means", step=0.5, refine=8, fit_rows=64),
]


@pytest.fixture
def gpu():
    """A GPU without memory: what reads a value, takes its size from one or mixes devices raises."""
    with FakeTensorMode():
        yield torch.device("cuda")


def said(device: torch.device) -> tuple[Rows, TeacherSignal]:
    """Rows of which some labels are hidden and some images mixed, and what a teacher says of them."""
    labels = torch.tensor([3, -1, 0, 9, -1, 5])
    rows = Rows(
        np.arange(BATCH, dtype=np.uint64),
        labels,
        labels.flip(0),
        torch.tensor([1, 0.3, 0.7, 1, 1, 0.5]),
        pixels=torch.arange(BATCH * 3 * 8 * 8).view(BATCH, 3, 8, 8).to(torch.uint8),
        box=torch.tensor([[-1, 2, 8, 8]] * BATCH, dtype=torch.int16),
        flip=torch.tensor([0, 1] * (BATCH // 2), dtype=torch.uint8),
    )
    ids = torch.arange(BATCH * 8 * 8 * 3).view(BATCH, 8, 8, 3) % TEMPLATES
    probs = unpack_probs(1 + ids * 1000)
    decided = {
        "last": {"id": ids[:, :4, :4].to(device), "prob": probs[:, :4, :4].to(device)},
        "first": {
            "subclass": (ids[..., 0] % PER_CLASS).to(torch.uint8).to(device),
            "table": torch.eye(CLASSES * PER_CLASS).softmax(dim=1).to(device),
        },
    }
    logits = torch.linspace(-3, 9, BATCH * CLASSES).view(BATCH, CLASSES).to(device)
    features = {"penultimate": logits**2}
    return rows.map(lambda tensor: tensor.to(device)), TeacherSignal(logits, decided, features)


def for_term(term: Term, rows: Rows) -> Rows:
    """The rows, with sets of labels where a term is about them."""
    sets = torch.ones(BATCH, packed_bytes(CLASSES), dtype=torch.uint8, device=rows.labels.device)
    return replace(rows, labels=sets, other_labels=sets) if term.needs.label == "set" else rows


# ---- as on a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", WITHOUT_HEADS.values(), ids=list(WITHOUT_HEADS))
@pytest.mark.parametrize("mixes", [False, True])
def test_every_objective_computes_on_a_gpu_without_waiting_for_it(gpu, term, mixes):
    rows, signal = said(gpu)
    scores = {
        "penultimate": torch.empty(BATCH, TEMPLATES, 4, 4, device=gpu),
        "layer3": torch.empty(BATCH, CLASSES * PER_CLASS, 8, 8, device=gpu),
    }
    logits = torch.empty(BATCH, CLASSES, device=gpu)
    batch = replace(loss_batch(for_term(term, rows), CLASSES, mixes), label_smoothing=0.1, scores=scores)
    values = own_parts([term], logits, signal, batch)
    assert (values.device.type, values.shape) == ("cuda", (1,))
    for count in (term.count(batch), term.fallbacks(logits, signal)):
        assert isinstance(count, int) or count.device.type == "cuda"


@pytest.mark.parametrize("fill", ["zeros", "reflect"])
def test_views_are_rendered_and_normalised_on_a_gpu_without_waiting_for_it(gpu, fill):
    rows, _ = said(gpu)
    pixels = render(rows.images, rows.box, rows.flip, (8, 8), fill)
    assert (pixels.device.type, pixels.dtype, pixels.shape) == ("cuda", torch.uint8, (BATCH, 3, 8, 8))
    inputs = normalise(pixels, NORMALISATION)
    assert (inputs.device.type, inputs.dtype, inputs.shape) == ("cuda", torch.float32, (BATCH, 3, 8, 8))


def learned_and_unpacked(codec: Codec) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A codec's tables, and what it hands over of two views of 32 images."""
    logits = np.random.default_rng(0).standard_normal((32, 2, 70)).astype(np.float32)
    tables = codec.fit(logits)
    return tables, codec.unpack(codec.encode(logits, tables), tables)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.label())
def test_every_codec_decodes_on_a_gpu_without_waiting_for_it(codec: Codec):
    tables, arrays = learned_and_unpacked(codec)

    def like(known: dict[str, np.ndarray]) -> dict[str, Tensor]:
        # Torch knows uint16 but can do little with it: readers make it int32.
        tensors = {
            name: torch.from_numpy(one.astype(np.int32 if one.dtype == np.uint16 else one.dtype))
            for name, one in known.items()
        }
        return {name: torch.empty(one.shape, dtype=one.dtype, device="cuda") for name, one in tensors.items()}

    with FakeTensorMode():
        decoded = codec.decode(like(arrays), 70, like(tables))
        both = ensemble_logits([decoded, decoded], Ensemble((1, 3)))
    for one in (decoded, both):
        assert (one.device.type, one.dtype, one.shape) == ("cuda", torch.float32, (32, 2, 70))


def test_constants_are_made_once_and_never_those_of_a_mode_that_ended():
    real = torch.zeros(1)
    with FakeTensorMode():
        fake = torch.zeros(1)
        assert isinstance(constant((1.0, 2.5), fake), FakeTensor)
    with torch.inference_mode():
        made = constant((1.0, 2.5), real)
    assert type(made) is Tensor
    assert not made.is_inference()
    assert made.tolist() == [1.0, 2.5]
    assert constant((1.0, 2.5), real) is made
    with FakeTensorMode():
        assert isinstance(constant((1.0, 2.5), torch.zeros(1)), FakeTensor)


# ---- counted -------------------------------------------------------------------------------------------------------

READ, MADE = ("aten::_local_scalar_dense", "aten::nonzero"), ("aten::lift_fresh",)


def counted(work, names=READ) -> int:
    """How often a number was read from a tensor, or a size taken from its values; of MADE: tensors made of numbers."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    return sum(event.count for event in profiled.key_averages() if event.key in names)


def step_of(term: Term, optimizer: str):
    """A whole step, from images that are to be rendered to changed weights; and the student."""
    torch.manual_seed(0)
    training = {"optimizer": {"name": optimizer, "lr": 0.01}, "label_smoothing": 0.1}
    recipe = make_recipe(training=training).model_copy(update={"views": EVERYTHING})  # which mix
    network, example = build("networks:small", CLASSES, {"width": 2}), torch.zeros(2, 3, 8, 8)
    layers = {
        after: insert_kd_layer(network, module, templates, value_ratio=1.0, example=example)[0]
        for after, module, templates in (
            ("layer3", "body.2", CLASSES * PER_CLASS),
            ("penultimate", "body.5", TEMPLATES),
        )
    }
    known = DatasetRows(np.arange(BATCH, dtype=np.uint64), torch.tensor([3, -1, 0, 9, -1, 5]), 0)
    vectors = put_vector_taps(network, {None: TapPoint(module="head", at="input")})
    head = term.head(64, CLASSES, lambda: known)
    heads = {} if head is None else {0: head}
    hashes = known.key_hash if isinstance(term, CRD) else None
    student = Student(network.train(), layers, features=vectors, heads=heads, row_hashes=hashes)
    made, weights = make_optimizer(recipe.training, network, list(heads.values())), term_weights([term], 0, 1, CPU)
    run, (rows, signal) = Run(recipe, "one", [term], 0, Folder(Path("unused")), CPU), said(CPU)

    of_term = for_term(term, rows)

    def step() -> None:
        pixels = render(rows.images, rows.box, rows.flip, (8, 8), "zeros")
        logits, _ = train_step(run, student, made, replace(of_term, pixels=pixels), signal, weights)
        term.fallbacks(logits, signal)
        said_of(signal.logits, rows)

    return step, student


@pytest.mark.parametrize("term", TERMS.values(), ids=list(TERMS))
def test_a_step_of_every_objective_reads_nothing_back_and_brings_no_numbers(term):
    step, student = step_of(term, "sgd")
    normalise(torch.zeros(1, 3, 2, 2), make_recipe().data.normalisation)  # whose constants are made once
    before = [one.clone() for one in student.network.parameters()]
    # The numbers of the rows, of which CRD alone asks, are made of keys on the host and copied without waiting.
    assert counted(step, (*READ, *MADE)) == isinstance(term, CRD)
    assert any(not torch.equal(*pair) for pair in zip(before, student.network.parameters(), strict=True))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.label())
def test_decoding_reads_nothing_back_and_brings_no_numbers(codec: Codec, monkeypatch):
    monkeypatch.setattr(klt_means, "likeliest", likeliest_by_torch)  # as on a device
    monkeypatch.setattr(klt_means, "whole_of_views", whole_by_torch)
    monkeypatch.setattr(klt_means, "refined", refined_by_torch)
    learned, unpacked = learned_and_unpacked(codec)
    tables, arrays = codec.decoding_tables(learned), tensors_of(unpacked)
    codec.decode(arrays, 70, tables)  # whose constants are made once
    assert counted(lambda: codec.decode(arrays, 70, tables), (*READ, *MADE)) == 0


def test_what_counts_reads_would_find_them():
    found = torch.arange(4.0)
    for work in (lambda: found.sum().item(), lambda: bool(found.any()), lambda: found[found > 1]):
        assert counted(work) == 1
    assert counted(lambda: torch.tensor([1.0]), MADE) == 1


def test_adamw_reads_only_its_own_counters_which_lie_on_the_host():
    step, student = step_of(TERMS["kd"], "adamw")
    assert counted(step) == sum(one.requires_grad for one in student.network.parameters())


def test_a_pass_reads_as_often_whatever_its_number_of_steps(recipe, manifest, roots, store_path, tmp_path):
    """What is measured is read when a pass ends. The evaluation, which is no step, reads alike in both."""

    def of(batch_size: int) -> int:
        training = recipe.training.model_copy(update={"batch_size": batch_size, "epochs": 1})
        changed, out = recipe.model_copy(update={"training": training}), tmp_path / str(batch_size)
        options = {"objective": "dtkd", "stores": [str(store_path)]}
        return counted(lambda: distill(changed, manifest, roots, out, CPU, **options))

    assert of(100) == of(400)


# ---- the same numbers ----------------------------------------------------------------------------------------------


def test_hidden_labels_are_left_out_of_subclass_decisions_as_if_their_rows_were():
    torch.manual_seed(0)
    scores = torch.randn(BATCH, CLASSES * PER_CLASS, 8, 8, dtype=torch.float64).requires_grad_()
    rows, signal = said(CPU)
    decided = dict(signal.decisions["first"])
    known = rows.labels >= 0
    ids = rows.labels[known][:, None, None] * PER_CLASS + decided["subclass"][known].long()
    expected = subclass_decisions(scores[known], ids, decided["table"])
    # What a store says of a row without a label may be anything.
    decided["subclass"] = torch.where(known[:, None, None], decided["subclass"], 255)
    term = SubclassTerm(term="subclass_decisions", decisions="first", after="layer3")
    batch = LossBatch(rows.labels, scores={"layer3": scores})
    logits, said_of = torch.zeros(BATCH, CLASSES), TeacherSignal(decisions={"first": decided})
    value = term(logits, said_of, batch)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(one, scores)[0] for one in (value, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)
    none = term(logits, said_of, LossBatch(torch.full((BATCH,), -1), scores={"layer3": scores}))
    assert none.item() == 0
    assert torch.autograd.grad(none, scores)[0].count_nonzero() == 0


def test_nkd_is_that_of_a_mask_to_the_bit():
    torch.manual_seed(0)
    z_s, z_t = (5 * torch.randn(2, 7, 100)).unbind()
    z_s, y = z_s.clone().requires_grad_(), torch.randint(100, (7,))
    other = ~F.one_hot(y, 100).bool()
    p, log_q = F.softmax(z_t, dim=1), F.log_softmax(z_s, dim=1)
    rest = F.softmax(z_t[other].view(7, 99) / 2, dim=1) * F.log_softmax(z_s[other].view(7, 99) / 2, dim=1)
    at = y[:, None]
    masked = -(p.gather(1, at) * log_q.gather(1, at)).mean() - 1.5 * 2**2 * rest.sum(dim=1).mean()
    value = nkd(z_s, z_t, y, gamma=1.5, temperature=2)
    assert torch.equal(value, masked)
    assert torch.equal(*(torch.autograd.grad(one, z_s)[0] for one in (value, masked)))


# ---- one ahead -----------------------------------------------------------------------------------------------------


def test_a_batch_is_made_while_the_one_before_is_used_and_no_more_than_one():
    begun = [threading.Event() for _ in range(4)]

    def items():
        for one in begun[:3]:
            one.set()
            yield one
        begun[3].set()
        raise RuntimeError("the third was the last")

    with ThreadPoolExecutor(1) as thread:
        shown = one_ahead(items(), thread)
        for number in range(3):
            assert next(shown) is begun[number]
            assert begun[number + 1].wait(timeout=10)
            assert not any(one.is_set() for one in begun[number + 2 :])
        with pytest.raises(RuntimeError, match="the third was the last"):
            next(shown)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_real_gpu_batches_are_those_of_the_cpu_and_steps_do_not_wait(recipe, manifest, roots, store_path):
    images, store = training_images(recipe, manifest, roots), open_store(store_path)
    source, device = source_of(recipe, images, [store], recipe.objectives["dtkd"]), torch.device("cuda", 0)
    here, there = (make_loader(recipe, source, 0, one).epoch(0) for one in (CPU, device))
    terms = recipe.objectives["dtkd"]
    student = new_student(recipe, images, 0, device, terms)
    run, ask = Run(recipe, "dtkd", terms, 0, Folder(Path("unused")), device), stored_signal([store], terms, device)
    optimizer, weights = make_optimizer(recipe.training, student.network), term_weights(terms, 0, 1, device)
    for one, other in zip(here, there, strict=True):
        for expected, found in zip(one.fields(), other.fields(), strict=True):
            assert torch.equal(expected, found.cpu())
        tally = _Tally.after(Progress(sums=[0.0] * len(terms)), device)
        train_step(run, student, optimizer, other, ask(other), weights)  # what is made once is made
        torch.cuda.set_sync_debug_mode("error")
        try:
            signal = ask(other)
            logits, parts = train_step(run, student, optimizer, other, signal, weights)
            tally.add(run, logits, signal, parts, other)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- the first batch -----------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=50),
    st.integers(1, 17),
    st.integers(1, 5),
    st.integers(1, 2),
    st.integers(0, 9),
)
def test_pools_grow_from_one_tar_and_lose_no_row(counts, pool_blocks, num_workers, epochs, epoch):
    order = Order(3, epoch, epochs, counts, pool_blocks, 8, grows=True)
    pools = [order.positions(pool) for pool in range(order.num_pools)]
    assert [position for pool in pools for position in pool] == list(range(len(counts)))
    for number, pool in enumerate(pools[:-1]):
        assert len(pool) == min(2**number, pool_blocks)
    shown = [np.concatenate([one.ravel() for one in order.slots(pool)]) for pool in range(order.num_pools)]
    for pool, slots in enumerate(shown):
        assert sorted(slots.tolist()) == list(range(order.starts[pool], order.starts[pool + 1]))
    homes, load = home_workers(counts, num_workers), [0] * num_workers
    small = [pool for pool in range(order.num_pools) if 2**pool < pool_blocks]
    for pool in small:
        for tar, worker in zip(order.tars[pools[pool]], order.workers(pool, homes, 1.25), strict=True):
            load[worker] += counts[tar]
    # One worker alone would otherwise read half of the first tars.
    assert max(load) <= max(1.25 * sum(load) / num_workers, sum(load) / num_workers + max(counts))


def test_the_first_batch_of_photographs_waits_for_one_tar_and_ranks_and_resumption_agree(tmp_path, monkeypatch):
    tars = pack(make_samples(), tmp_path / "photos", "train", 9)
    dataset = Dataset(folder="photos", classes=["a", "b", "c"], splits={"train": Split(tars=tars)})
    images = BlockLoader(dataset, dataset.splits["train"], [tmp_path], decode=False)
    views = RandomCrop(kind="random_resized_crop", size=8, count=4)
    source, rendered = Source(images, views, view_groups(views.num_views, 2)), list[int]()
    real = Reader._pieces

    def spy(self: Reader, order: Order, position: int, *rest: object):
        rendered.append(position)
        return real(self, order, position, *rest)

    monkeypatch.setattr(Reader, "_pieces", spy)
    loaders = [
        Loader(source, Options(9, pool_blocks=4, rank=rank, world=world), CPU) for rank, world in ((0, 1), (1, 2))
    ]
    alone = []
    for batch in loaders[0].epoch(0):
        alone.append(batch.key_hash.tolist())
        if len(alone) in (1, 2, 4):
            assert rendered == list(range(2 * len(alone) - 1))
    assert sorted(key for keys in alone for key in keys) == sorted(
        key for block in images for key in block.key_hash.tolist()
    )
    assert [batch.key_hash.tolist() for batch in loaders[1].epoch(0, 2)] == [keys[1::2] for keys in alone[2:]]

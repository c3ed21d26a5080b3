import pytest

from dpo.planning.chips import CHIPS, Topology, chip_named, parse_topology, ring_bandwidth


@pytest.mark.parametrize(
    ("text", "topology"),
    [
        ("v5e:4x4", Topology("v5e", (4, 4))),
        ("V5P:2x2x4", Topology("v5p", (2, 2, 4))),
        ("h100:8", Topology("h100", (8,))),
        ("a100_40gb:8", Topology("a100_40gb", (8,))),
        ("cpu:2", Topology("cpu", (2,))),
    ],
)
def test_topologies_are_read(text, topology):
    assert parse_topology(text) == topology
    assert parse_topology(topology.text) == topology


@pytest.mark.parametrize("text", ["v5e", "v7:4x4", "h100:2x4", "cpu:0", "v5e:4x", ""])
def test_others_are_refused_with_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"topology is .*; allowed is"):
        parse_topology(text)


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        *(("NVIDIA L4", "l4"), ("NVIDIA L40S, 550.54.15", "l40s"), ("NVIDIA L40", None)),
        *(("NVIDIA H100 80GB HBM3, 570.86", "h100"), ("NVIDIA H200", "h200")),
        *(("NVIDIA H100 PCIe", "h100pcie"), ("NVIDIA H100 NVL", "h100nvl"), ("NVIDIA H200 NVL", None)),
        *(("NVIDIA A100-SXM4-40GB", "a100_40gb"), ("NVIDIA A100-PCIE-40GB", None)),
        *(("NVIDIA A100 80GB PCIe", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)),
        *(("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "rtx4090")),
        *(("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None)),
        *(("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("none", None)),
    ],
)
def test_a_card_is_known_by_whole_words(device, kind):
    assert chip_named(device) == kind


def test_a_ring_of_tpus_goes_both_ways():
    assert ring_bandwidth(CHIPS["v5e"]) == 2 * CHIPS["v5e"].link
    assert ring_bandwidth(CHIPS["h100"]) == CHIPS["h100"].link


@pytest.mark.parametrize(("kind", "slower"), [("v5e", 6), ("v4", 6), ("a100", 16), ("h100", 14.8)])
def test_float32_is_not_a_shorter_format(kind, slower):
    """Six bfloat16 passes of a TPU; NVIDIA's FP32 figure (A100: 19.5 of 312 TFLOP/s, H100 SXM: 67 of 989)."""
    assert CHIPS[kind].flops / CHIPS[kind].float32_flops == pytest.approx(slower, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "tflops", "memory", "bandwidth"),
    [("h100pcie", 756.5, 80e9, 2.0e12), ("h100nvl", 835.5, 94e9, 3.9e12), ("a100_40gb", 312, 40e9, 1.555e12)],
)
def test_cards_of_one_name_differ_in_rates_and_memory(kind, tflops, memory, bandwidth):
    """NVIDIA's data sheets; of H100 PCIe and NVL half of the figures with sparsity (1,513 and 1,671)."""
    chip = CHIPS[kind]
    assert (chip.flops / 1e12, chip.memory, chip.bandwidth) == (tflops, memory, bandwidth)

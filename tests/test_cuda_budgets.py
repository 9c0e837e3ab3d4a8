"""The budgets of the CUDA kernels: the file's lines, names of kernels, and what is read from nvcc's tools. No nvcc."""

import fnmatch
import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "cuda"))
import budget
from kernel_names import Kernel, Source, kernels_of_sources
from measures import Code, Launches, occupancy, read_ptxas, read_sass

DOT = Kernel("dot_kernel", ("bfloat16", "float"), ("true", "16", "bfloat16", "float"))


def test_a_kernel_has_one_name_for_all_tools():
    of_nvcc = "void unilora::(anonymous namespace)::dot_kernel<true, 16, __nv_bfloat16, float>(__nv_bfloat16 const*, "
    of_nvcc += "long, float*)"
    assert Kernel.parse(of_nvcc) == DOT
    assert Kernel.parse("dot_kernel<kWide, kRanks>(__nv_bfloat16 const*, long, float*) [16]") == Kernel(
        "dot_kernel", ("bfloat16", "float"), ("16",)
    )
    assert Kernel.parse("unilora::index_kernel(int*, long, float, unilora::Map)") == Kernel("index_kernel", ("int",))
    nested = "void unilora::k<unilora::Dot<__half, (unilora::FactorLayout)0, (bool)1> >(unilora::Dot<__half>::T const*)"
    assert Kernel.parse(nested) == Kernel("k", ("half",), ("Dot", "half", "0", "true"))
    assert Kernel.parse("kernel(unilora::Outer<__nv_bfloat16, float>)").types == ("bfloat16", "float")


def test_the_file_is_read():
    held = budget.read("""# all

[dot]
N = 8  # a size
M = 2 * N
dot_* bfloat16 #2 | bytes | 1.5 * (M + 4 ** 2)
[sum]
N = 9
a | mma | >= 1 # so
""")
    assert held.sizes == {"dot": {"N": 8, "M": 16}, "sum": {"N": 9}}
    assert held.flags("dot") == ["-DN=8", "-DM=16"] and held.flags("other") == []
    first, second = held.lines
    assert (first.number, first.stem, first.kernel, first.metric) == (6, "dot", "dot_* bfloat16 #2", "bytes")
    assert (first.limit, first.at_least, first.launch) == (48, False, 2)
    assert (second.stem, second.limit, second.at_least, second.launch) == ("sum", 1, True, None)
    assert first.holds(48) and not first.holds(49) and second.holds(1) and not second.holds(0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("N 8", "expected NAME = SIZE"),
        ("[dot]", "stands above already"),
        ("a | bytes", "expected KERNEL | METRIC | LIMIT"),
        ("a | time | 3", "'time' is none of bytes"),
        ("a | bytes | 3 * X", "no size X"),
        ("a | bytes | open('x')", "expected numbers"),
        ("a | bytes | 3 +", "invalid syntax"),
    ],
)
def test_a_line_that_is_not_understood_is_named(line, words):
    with pytest.raises(budget.BudgetError, match=r"^budgets:2: ") as error:
        budget.read(f"[dot]\n{line}\n")
    assert words in str(error.value)
    with pytest.raises(budget.BudgetError, match=r"expected \[STEM\]"):
        budget.read("a | bytes | 3")


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("dot_kernel", True),
        ("dot_*", True),
        ("dot", False),
        ("dot_kernel bfloat16", True),
        ("dot_kernel bfloat16 float 16 true", True),
        ("dot_kernel float", False),  # types from the first on
        ("dot_kernel 4", False),
        ("dot_kernel bfloat16 #1", True),
    ],
)
def test_patterns(pattern, matches):
    assert budget.Line(1, "dot", pattern, "bytes", 0).matches(Launches("dot", DOT)) is matches
    assert not budget.Line(1, "sum", pattern, "bytes", 0).matches(Launches("dot", DOT))


def record(read: int, written: int) -> dict:
    return {"unique_bytes_read": read, "unique_bytes_written": written, "blocks": 2, "threads": 256}


def test_verdicts_take_the_worst_launch_and_the_worst_architecture():
    launches = [Launches("dot", DOT, [record(10, 1), record(20, 2)])]
    codes = [
        Code("dot", DOT, f"sm_{a}", registers=registers, load_bits=bits)
        for a, registers, bits in ((80, 64, 128), (80, 70, 16), (90, 60, 128), (90, 50, 16))
    ]

    def one(text: str) -> budget.Verdict:
        (verdict,) = budget.verdicts(*budget.read(f"[dot]\n{text}").lines, launches, codes)
        return verdict

    assert one("dot_kernel | bytes | 21").measured == 22 and not one("dot_kernel | bytes | 21").good
    assert one("dot_kernel #1 | bytes | 11").good
    assert one("dot_kernel | registers | 69").measured == 70
    assert one("dot_kernel | load_bits | >= 128").good  # the instance for aligned rows has them
    codes[2].load_bits = 64
    assert not one("dot_kernel | load_bits | >= 128").good
    codes[0].load_bits = codes[1].load_bits = None
    assert one("dot_kernel | load_bits | >= 128").measured is None
    assert budget.verdicts(*budget.read("[dot]\nother | bytes | 1").lines, launches, codes) == []
    assert budget.without_budget(budget.read("[dot]\nother | bytes | 1"), launches) == launches


def test_kernels_are_found_with_their_lines(tmp_path):
    (tmp_path / "k.cuh").write_text("""// __global__ of a comment
template <typename T>
static __global__ void __launch_bounds__(kBlock, (kBlocks<T>))
    one_kernel(const T* x) {
  if (x) { }
}
__global__ void two_kernel() {}
""")
    assert kernels_of_sources(tmp_path) == {
        "one_kernel": Source(tmp_path / "k.cuh", 3, 6),
        "two_kernel": Source(tmp_path / "k.cuh", 7, 7),
    }


def test_shared_memory_that_was_not_seen_is_named():
    codes = [Code("dot", DOT, "sm_90", shared=4096)]
    launches = [Launches("dot", DOT, [{"shared_requests": 0}])]
    assert budget.unseen(launches, codes) == launches
    launches[0].records.append({"shared_requests": 1})
    assert budget.unseen(launches, codes) == []


def test_ptxas_and_sass_are_read():
    ptxas = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
ptxas info    : Function properties for _Z1kv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 154 registers, used 1 barriers, 32768 bytes smem, 392 bytes cmem[0]
ptxas info    : Compile time = 11.510 ms
"""
    assert read_ptxas(ptxas) == {("_Z1kv", "sm_90"): {"registers": 154, "shared": 32768, "spills": 16}}
    sass = """	code for sm_90
		Function : _Z1kv
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.LTC128B.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @P0  HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
"""
    assert read_sass(sass) == {("_Z1kv", "sm_90"): {"load_bits": 128, "store_bits": 32, "mma": 1, "copies": 1}}


def test_occupancy():
    assert occupancy(256, 32, 0) == 1
    assert occupancy(256, 33, 0) == 0.75  # 40 registers a thread, six blocks
    assert occupancy(128, 96, 8256) == 5 * 4 / 64
    assert occupancy(1024, 32, 100 * 1024) == 1 and occupancy(1024, 32, 120 * 1024) == 0.5
    assert occupancy(32, 16, 0) == 0.5  # 32 blocks


def test_the_lines_are_about_kernels_that_there_are():
    kernels = kernels_of_sources()
    assert kernels and all(name.isidentifier() and name.endswith("_kernel") for name in kernels)
    held = budget.read(budget.FILE.read_text())
    assert all(math.isfinite(line.limit) for line in held.lines)
    names = {line.kernel.split()[0] for line in held.lines}
    assert [name for name in names if not fnmatch.filter(kernels, name)] == []

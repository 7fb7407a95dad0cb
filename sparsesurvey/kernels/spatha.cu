// Spatha's kernel for V:N:M behind one C function that ctypes can call. Its headers (UDC-GAC/venom, Apache-2.0) are no part of
// this project: see spatha.py for how to build this file with them.

#include "spmm/blockwise_op.h"

#include <type_traits>

struct Operand {
    int out, tokens, in, m;
    half *values, *x, *y;
    unsigned *metadata, *columns;
};

// One of its tiles: BM outputs (one panel) by BN tokens, of which a warp multiplies WM by WN.
template <int BM, int BN, int WM, int WN, int STAGES> int launch(const Operand& given, cudaStream_t stream) {
    using namespace spatha;
    using Tile = SpmmBlockwiseOp<ShapeBase<BM, BN, 32>, ShapeBase<WM, WN, 32>, ShapeBase<16, 8, 32>, STAGES>;
    using Kernel = typename Tile::KernelImpl;
    size_t shared = Kernel::input_buffer_size_static;
    if (shared < Kernel::output_buffer_size_static)
        shared = Kernel::output_buffer_size_static;
    SpmmBlockwiseOpState::Argument_t arguments = {};
    arguments.M = given.out, arguments.N = given.tokens, arguments.K = given.in, arguments.nn = 2, arguments.mm = given.m;
    arguments.brow = 4, arguments.mbrow = 32, arguments.alpha = 1.0f;
    arguments.A_values = given.values, arguments.A_metadata = given.metadata, arguments.A_indices = given.columns;
    arguments.B = given.x, arguments.D = given.y;
    auto status = cudaFuncSetAttribute(_spmmBlockwiseKernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (status != cudaSuccess)
        return status;
    _spmmBlockwiseKernel<Kernel><<<dim3(given.out / BM, given.tokens / BN), Kernel::blockDim, shared, stream>>>(arguments);
    return cudaGetLastError();
}

// y [out, tokens] = W x [in, tokens] for panels of v outputs; -1 where there is no such choice of a tile
extern "C" int spatha_product(int v, int choice, int out, int tokens, int in, int m, void* values, void* metadata, void* columns,
                              void* x, void* y, void* stream) {
    using Launch = int (*)(const Operand&, cudaStream_t);
    static const Launch low[] = {launch<64, 64, 32, 32, 3>, launch<64, 64, 32, 64, 4>, launch<64, 128, 32, 64, 3>,
                                 launch<64, 128, 64, 64, 3>, launch<64, 128, 32, 64, 4>},
                        high[] = {launch<128, 64, 32, 64, 4>, launch<128, 64, 64, 32, 3>, launch<128, 128, 64, 64, 2>,
                                  launch<128, 128, 64, 64, 4>, launch<128, 128, 32, 64, 4>};
    static_assert(std::extent<decltype(low)>::value == 5 && std::extent<decltype(high)>::value == 5, "CHOICES of spatha.py");
    if ((v != 64 && v != 128) || choice < 0 || choice >= 5)
        return -1;
    Operand given = {out, tokens, in, m, (half*)values, (half*)x, (half*)y, (unsigned*)metadata, (unsigned*)columns};
    return (v == 64 ? low : high)[choice](given, (cudaStream_t)stream);
}

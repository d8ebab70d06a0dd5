"""Lets each quantized scheme's own library quantize and dequantize. Started by test_quantized_libraries.py.

    python dequantize_quantized.py FOLDER    writes, for each case, FOLDER/CASE.safetensors (the library's own tensors,
                                             under "m.") and FOLDER/CASE.expected.safetensors ("m.weight", dequantized)

compressed-tensors, bitsandbytes, transformers and nvidia-modelopt run on a CPU. A case whose library is missing is left
out; the test skips it.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(sys.argv[1])
torch.manual_seed(5)
EVEN = torch.randn(96, 384) * 0.05
ODD = torch.randn(130, 200) * 0.05


def save(case, tensors, expected):
    save_file({f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}, FOLDER / f"{case}.safetensors")
    save_file({"m.weight": expected.contiguous()}, FOLDER / f"{case}.expected.safetensors")


def compressed_tensors():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    def case(name, fmt, weight, dtype, **options):
        args = QuantizationArgs(**options)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = weight.to(dtype)
        n_rows, n_cols = weight.shape
        if args.group_size:
            blocks = weight.reshape(n_rows, -1, args.group_size)
            low, high = blocks.amin(-1), blocks.amax(-1)
        elif args.strategy == "block":
            height, width = args.block_structure
            grid = (-(-n_rows // height), -(-n_cols // width))
            pieces = [
                [weight[i * height : (i + 1) * height, j * width : (j + 1) * width] for j in range(grid[1])]
                for i in range(grid[0])
            ]
            low = torch.stack([torch.stack([piece.min() for piece in row]) for row in pieces])
            high = torch.stack([torch.stack([piece.max() for piece in row]) for row in pieces])
        elif args.strategy == "channel":
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        else:
            low, high = weight.min().reshape(1), weight.max().reshape(1)
        state = {"weight": weight}
        if fmt == "nvfp4-pack-quantized":
            state["weight_global_scale"] = generate_gparam(weight.min(), weight.max()).reshape(1)
        scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
        scale = scale if fmt.startswith(("nv", "mx")) else scale.to(dtype)
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(fmt)
        compressed = compressor.compress(state, scheme)
        compressed.pop("weight_zero_point" if args.symmetric else "", None)
        save(f"compressed-tensors {name}", dict(compressed), compressor.decompress(dict(compressed), scheme)["weight"])

    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    group = {"strategy": "group", "type": "int"}
    for bits in (2, 3, 4, 5, 8):
        case(f"int{bits} groups", "pack-quantized", EVEN, bf16, num_bits=bits, group_size=64, symmetric=True, **group)
    case("int4 asymmetric", "pack-quantized", EVEN, f16, num_bits=4, group_size=128, symmetric=False, **group)
    case("int3 asymmetric", "pack-quantized", ODD, bf16, num_bits=3, group_size=40, symmetric=False, **group)
    case("int4 channel", "pack-quantized", ODD, f32, num_bits=4, strategy="channel", type="int", symmetric=False)
    case("int8 channel", "int-quantized", ODD, bf16, num_bits=8, strategy="channel", type="int", symmetric=True)
    case("int8 asymmetric", "naive-quantized", ODD, bf16, num_bits=8, strategy="channel", type="int", symmetric=False)
    for dtype, name in ((bf16, "bf16"), (f16, "f16"), (f32, "f32")):
        case(f"fp8 channel {name}", "float-quantized", ODD, dtype, num_bits=8, strategy="channel", type="float")
    case("fp8 tensor", "float-quantized", ODD, bf16, num_bits=8, strategy="tensor", type="float")
    case(
        "fp8 block",
        "float-quantized",
        ODD,
        bf16,
        num_bits=8,
        strategy="block",
        type="float",
        block_structure=[128, 128],
    )
    case(
        "nvfp4",
        "nvfp4-pack-quantized",
        EVEN,
        bf16,
        num_bits=4,
        strategy="tensor_group",
        type="float",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    mx = {"strategy": "group", "type": "float", "group_size": 32, "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
    case("mxfp4", "mxfp4-pack-quantized", EVEN, bf16, num_bits=4, **mx)
    case("mxfp8", "mxfp8-quantized", EVEN, bf16, num_bits=8, **mx)


def awq():
    """Packed as AutoAWQ 0.2.9 does; read by compressed-tensors' converter, multiplied in F16 as AutoAWQ does."""
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    qweight = torch.randint(-(2**31), 2**31 - 1, (384, 12), dtype=torch.int32)
    qzeros = torch.randint(-(2**31), 2**31 - 1, (6, 12), dtype=torch.int32)
    scales = (torch.rand(6, 96) * 0.01 + 0.001).half()
    converter = AutoAWQConverter(bits=4, group_size=64)
    weight, scale, zero = converter._convert_gemm_module(qweight, scales, qzeros)
    spread = scale.repeat_interleave(64, 1)
    expected = (weight.to(torch.int8) - zero.to(torch.int8).repeat_interleave(64, 1)) * spread
    save("awq", {"qweight": qweight, "qzeros": qzeros, "scales": scales}, expected)


def bitsandbytes():
    import bitsandbytes.functional as functional

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                for block, weight in ((64, EVEN), (128, ODD)):
                    packed, state = functional.quantize_4bit(
                        weight.to(dtype), blocksize=block, quant_type=kind, compress_statistics=nested
                    )
                    parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
                    name = f"bitsandbytes {kind} {str(dtype)[6:]} {block}{' nested' if nested else ''}"
                    save(name, {"weight": packed, **parts}, functional.dequantize_4bit(packed, state))
    codes, scale, _ = functional.int8_vectorwise_quant(ODD.half())
    parts = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    save("bitsandbytes int8", parts, functional.int8_vectorwise_dequant(codes, scale))


def transformers():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    dequantize = Fp8Dequantize(None)._dequantize_one
    codes = (torch.randn(256, 384) * 50).to(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16):
        scale = (torch.rand(2, 3) * 0.01).to(dtype)
        save(
            f"transformers fp8 {str(dtype)[6:]}", {"weight": codes, "weight_scale_inv": scale}, dequantize(codes, scale)
        )
    exponent = torch.randint(110, 125, (256, 12), dtype=torch.uint8)
    save("transformers mxfp8", {"weight": codes, "weight_scale_inv": exponent}, dequantize(codes, exponent))
    blocks = torch.randint(0, 256, (3, 40, 6, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 40, 6), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    save("transformers mxfp4", {"weight_blocks": blocks, "weight_scales": scales}, expected)


def modelopt():
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    quantized, scale, double = NVFP4QTensor.quantize(EVEN, 16)
    expected = quantized.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
    parts = {"weight": quantized._quantized_data, "weight_scale": scale, "weight_scale_2": double.reshape(())}
    save("modelopt nvfp4", parts, expected)
    scale = (ODD.abs().max() / 448).reshape(())
    quantized, scale = FP8QTensor.quantize(ODD, scales=scale)
    expected = quantized.dequantize(torch.float32, scale=scale)
    save("modelopt fp8", {"weight": quantized._quantized_data, "weight_scale": scale.float().reshape(())}, expected)


for make in (compressed_tensors, awq, bitsandbytes, transformers, modelopt):
    try:
        make()
    except ImportError as error:
        print(f"{make.__name__}: {error}", file=sys.stderr)

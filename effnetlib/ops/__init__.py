"""Layers in the form that suits the platform that they are compiled for.

Each file starts with the plain formula. All forms compute it, and tests compare them with it.

| op                | platform | form                              | before and after                        |
|-------------------|----------|-----------------------------------|-----------------------------------------|
| `depthwise_conv`  | CPU      | sums of shifted products          | about four times faster, whole B0 step  |
|                   | GPU      | the same where cuDNN is slow      | 39.7 to 35.5 ms per step [1]            |
|                   | TPU      | the same below 64 channels        | 6.59 to 5.67 GB per step [2]            |
| `pointwise_conv`  | GPU      | product behind a barrier          | 76.1 to 73.4 ms per step [1]            |
|                   | TPU      | convolution from 64 channels on   | 7.70 to 6.59 GB per step [2]            |
| `full_conv`       | all      | product with patches (the stem)   | 5.31 to 4.82 GB per step [2]            |
| `norm_swish`      | CPU      | backward pass begins with x again | 416 to 382 ms, the widest block [3]     |
| `norm_swish_gate` | CPU      | chain rule, dscale by sums with x | 381 to 328 ms, the widest block [3]     |
|                   | GPU      | chain rule, dz written once       | 83.8 to 74.2 ms per step [1]            |
|                   | TPU      | sums saved by the forward pass    | 6.59 to 6.15 GB per step [2]            |

Without a row, a platform uses the plain formula. All figures but the first, and the forms that were
tried and dropped, are in outputs/published/tuning.json. [1] Time in CUDA kernels on one H200: whole B0,
224 pixels, batch 256. [2] The TPU compiler's prediction for v3: the stem and three stages of B0, 32 images
per core. [3] One CPU core: a block of 16x112x112x96, several changes at once.
"""

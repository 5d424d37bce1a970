"""Draw one picture with diffusers and save it, as its users write it: the counterpart of `ldm-pipe generate`."""

import sys

import torch
from diffusers import StableDiffusionPipeline

model, prompt, steps, scale, seed, device, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(model).to(device)
generator = torch.Generator().manual_seed(int(seed))
pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(scale), generator=generator).images[0].save(out)

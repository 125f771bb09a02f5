"""An image through a vision-language model: its views, its tokens, and what the model says next.

Run it with `.venv/bin/python examples/look_at_a_photo.py [IMAGE [CHECKPOINT]]`.
Without IMAGE a picture is generated. Without CHECKPOINT, a folder with config.json and safetensors,
the model is "tiny": the 10B's structure with random weights, so what it says means nothing.
"""

import sys

import torch
from PIL import Image

from model.step3vl import Step3VL
from model.text.prompt import build_prompt
from model.vision.image import load_image, preprocess

device = "cuda" if torch.cuda.is_available() else "cpu"
options = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
if len(sys.argv) > 2:
    model = Step3VL.from_pretrained(sys.argv[2], **options)
else:
    model = Step3VL.from_preset("tiny", **options)
image = load_image(sys.argv[1] if len(sys.argv) > 1 else Image.effect_noise((1280, 720), 64))

views = preprocess(image, model.config.vision)
content = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
ids = build_prompt([{"role": "user", "content": content}], model.tokenizer, model.config, [views])
image_tokens = ids.count(model.config.tokens.im_patch)
print(f"{image.width} x {image.height} pixels: {len(views.crops)} crops and a global view")
print(f"prompt: {len(ids)} tokens, {image_tokens} of them embeddings of the image")

logits = model(ids, images=[views])  # [tokens, vocabulary]
best = logits[-1].float().softmax(-1).topk(3)
print("most probable next tokens:", *zip(best.indices.tolist(), best.values.tolist(), strict=True))
answer = model.generate(ids, images=[views], max_tokens=16)
print(f"{model.config.name} on {device} says: {model.tokenizer.decode(answer)!r}")

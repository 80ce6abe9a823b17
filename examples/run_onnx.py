"""Detects with an exported file in numpy and onnxruntime alone: `python run_onnx.py model.onnx picture.jpg [lowest score]`."""

import json
import sys

import cv2  # reads and resizes the picture
import numpy as np
import onnxruntime


def detect(model: str, picture: np.ndarray, conf: float = 0.25, iou: float = 0.7) -> list[tuple[str, float, list[float]]]:
    """Names, scores and boxes (x1, y1, x2, y2) of what is on an RGB picture; the file has the default outputs and its vocabulary in it."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    names, size = json.loads(told["crqat_fx.names"]), json.loads(told["crqat_fx.size"])
    height, width = size if isinstance(size, list) else (size["default"], size["default"])
    ratio = min(height / picture.shape[0], width / picture.shape[1])
    rows, columns = int(picture.shape[0] * ratio), int(picture.shape[1] * ratio)
    top, left = (height - rows) // 2, (width - columns) // 2
    resized = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR)
    images = np.full((1, height, width, 3), 114, np.uint8)  # a letterbox: the picture in the middle of grey
    images[0, top : top + rows, left : left + columns] = resized
    if told["crqat_fx.input"] == "float":
        images = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    boxes, scores = (output[0] for output in session.run(["boxes", "scores"], {"images": images}))
    boxes = (boxes - np.array((left, top) * 2)) * np.array((picture.shape[1] / columns, picture.shape[0] / rows) * 2)
    areas, found = (boxes[:, 2:] - boxes[:, :2]).prod(1), []
    for name, column in zip(names, scores.T, strict=True):
        order = np.argsort(-column, kind="stable")[: (column > conf).sum()]
        while len(order):  # NMS: the best stays, what overlaps it goes
            best, order = order[0], order[1:]
            found.append((name, float(column[best]), boxes[best].clip(0, picture.shape[1::-1] * 2).tolist()))
            shared = (np.minimum(boxes[order, 2:], boxes[best, 2:]) - np.maximum(boxes[order, :2], boxes[best, :2])).clip(0).prod(1)
            order = order[shared <= iou * (areas[order] + areas[best] - shared)]
    return sorted(found, key=lambda one: -one[1])


if __name__ == "__main__":
    for name, score, box in detect(sys.argv[1], cv2.imread(sys.argv[2])[..., ::-1], *map(float, sys.argv[3:])):
        print(f"{score:.3f} {name} {[round(side, 1) for side in box]}")

"""Networks: by name, with weights, with feature maps read (taps) or scored (KD layers); the teacher; accuracy."""

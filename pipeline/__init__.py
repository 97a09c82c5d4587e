"""Fine-tune a Vision Transformer on images, and measure what came of it."""

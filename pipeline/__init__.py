"""Fine-tune image classifiers, evaluate them, explain them and publish them."""

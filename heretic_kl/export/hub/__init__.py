"""A saved model on the Hugging Face hub: metadata of its card, check of its folder, upload."""

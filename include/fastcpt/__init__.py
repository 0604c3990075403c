"""From an organisation's legal documents to a continued-pre-trained, fine-tuned model."""

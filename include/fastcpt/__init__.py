"""From an organisation's legal documents to a continued-pre-trained, fine-tuned model."""

# The last release in CHANGELOG.md. It is in run records and published models, but in no digest.
__version__ = "0.2.0"

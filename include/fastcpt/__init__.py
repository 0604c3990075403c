"""From an organisation's legal documents to a continued-pre-trained, fine-tuned model."""

# The last release in CHANGELOG.md. Run records and published models carry it; no digest holds it.
__version__ = "0.2.0"

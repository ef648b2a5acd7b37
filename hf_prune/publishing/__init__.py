"""Models that leave the machine.

Knows how a pruned model is saved with its card and pushed to the Hub, and how saved ones are read, opened,
inspected, compared and shown in a browser.
"""

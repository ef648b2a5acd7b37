"""What the recipes share: data, splits, dense models, the closing report. One concept a file."""

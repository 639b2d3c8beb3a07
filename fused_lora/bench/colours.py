"""The colours of pages and plots: name -> in light, in dark. "ink" and "muted" are for text and lines."""

COLOURS = {
    "ink": ("#1f2430", "#e8eaf0"),
    "muted": ("#646b78", "#a3aab8"),
    "grid": ("#dfe2e8", "#3a404d"),
    "paper": ("#ffffff", "#1b1e26"),
    "ours": ("#12806f", "#3fc9b3"),
    "frozen": ("#8a92a0", "#7b8494"),
    "blue": ("#2f6fde", "#7fa8f5"),
    "orange": ("#c95f14", "#f0a063"),
    "violet": ("#8a4fc7", "#bd93ec"),
    "red": ("#c2334d", "#f0808f"),
    "olive": ("#77801d", "#bcc658"),
    "cyan": ("#0e88a6", "#62c9e2"),
    "pink": ("#c0478e", "#ee94c8"),
    "brown": ("#8a5a3b", "#cb9c7a"),
}

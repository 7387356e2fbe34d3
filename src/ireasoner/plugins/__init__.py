"""The rewards of this package inside other trainers."""

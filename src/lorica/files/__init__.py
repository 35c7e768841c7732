"""Adapters and whole models as files. Foreign names and layouts live and die here."""

"""An application with SQLModel."""

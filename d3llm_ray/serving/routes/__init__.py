"""The HTTP routes over one `ChatService`, in groups; each module has a `router(service)`."""

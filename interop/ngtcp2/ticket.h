/* A session's ticket, as POST /v1/sessions answers it. */
#ifndef ANTIPHON_TICKET_H
#define ANTIPHON_TICKET_H

#include <stddef.h>
#include <stdint.h>

enum { ATTEMPTS = 8, RELAYS = 8 };

/* Where and as whom to ask. */
struct router {
    const char *address; /* "IP:PORT" */
    const char *name;    /* in its certificate */
    const char *ca_file; /* PEM */
    const char *api_key;
    const char *agent; /* "namespace/name" */
};

struct ticket {
    uint8_t session[16];
    char session_text[32];
    uint32_t epoch;
    char ticket[4097];
    uint8_t connection_ids[ATTEMPTS][20];
    size_t connection_id_lengths[ATTEMPTS];
    size_t connection_ids_count;
    char relays[RELAYS][64];
    size_t relays_count;
    char server_name[256];
    uint8_t trust_anchor[4096];
    size_t trust_anchor_length;
};

/* Asks for a session bound to an Ed25519 public key. 0, or -1 after saying why on standard error. */
int ticket_get(const struct router *router, const uint8_t client_key[32], struct ticket *ticket);

/* A connected socket to "IP:PORT" (IPv4, or IPv6 in brackets), or -1 after saying why. */
int connect_to(const char *address, int type);

#endif

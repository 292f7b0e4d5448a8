#include "ticket.h"

#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cjson/cJSON.h>
#include <gnutls/gnutls.h>

#include "wire.h"

int connect_to(const char *address, int type) {
    char host[64];
    const char *colon = strrchr(address, ':');
    size_t length = colon == NULL ? 0 : (size_t)(colon - address);
    if (length == 0 || length >= sizeof host) {
        fprintf(stderr, "%s is no IP:PORT\n", address);
        return -1;
    }
    int brackets = address[0] == '[' && address[length - 1] == ']';
    snprintf(host, sizeof host, "%.*s", (int)length - 2 * brackets, address + brackets);
    struct addrinfo *found, hints = {.ai_flags = AI_NUMERICHOST, .ai_socktype = type};
    int error = getaddrinfo(host, colon + 1, &hints, &found);
    if (error != 0) {
        fprintf(stderr, "%s: %s\n", address, gai_strerror(error));
        return -1;
    }
    int fd = socket(found->ai_family, type, 0);
    if (fd >= 0 && connect(fd, found->ai_addr, found->ai_addrlen) != 0) {
        perror(address);
        close(fd);
        fd = -1;
    }
    freeaddrinfo(found);
    return fd;
}

/* Sends a request over TLS and reads the answer to its end. The length of the answer, or -1. */
static int exchange(const struct router *router, const char *request, char *answer, size_t capacity) {
    int fd = connect_to(router->address, SOCK_STREAM), length = -1, error;
    if (fd < 0) {
        return -1;
    }
    gnutls_session_t session = NULL;
    gnutls_certificate_credentials_t trust = NULL;
    const gnutls_datum_t alpn = {(unsigned char *)"http/1.1", 8};
    gnutls_certificate_allocate_credentials(&trust);
    gnutls_init(&session, GNUTLS_CLIENT);
    gnutls_set_default_priority(session);
    gnutls_credentials_set(session, GNUTLS_CRD_CERTIFICATE, trust);
    gnutls_server_name_set(session, GNUTLS_NAME_DNS, router->name, strlen(router->name));
    gnutls_session_set_verify_cert(session, router->name, 0);
    gnutls_alpn_set_protocols(session, &alpn, 1, 0);
    gnutls_transport_set_int(session, fd);
    if (gnutls_certificate_set_x509_trust_file(trust, router->ca_file, GNUTLS_X509_FMT_PEM) < 1) {
        fprintf(stderr, "%s holds no certificate\n", router->ca_file);
        goto done;
    }
    do {
        error = gnutls_handshake(session);
    } while (error < 0 && gnutls_error_is_fatal(error) == 0);
    if (error < 0 || (error = (int)gnutls_record_send(session, request, strlen(request))) < 0) {
        fprintf(stderr, "router: %s\n", gnutls_strerror(error));
        goto done;
    }
    length = 0;
    while ((size_t)length < capacity - 1) {
        ssize_t read = gnutls_record_recv(session, answer + length, capacity - 1 - (size_t)length);
        if (read == GNUTLS_E_AGAIN || read == GNUTLS_E_INTERRUPTED) {
            continue;
        }
        if (read <= 0) {
            break; /* The router closes when it has said all; the JSON shows whether that was all. */
        }
        length += (int)read;
    }
    answer[length] = '\0';
done:
    gnutls_deinit(session);
    gnutls_certificate_free_credentials(trust);
    close(fd);
    return length;
}

/* A text of the answer, or "" if it is none. */
static const char *text_of(const cJSON *object, const char *name) {
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
    return text == NULL ? "" : text;
}

/* 26 characters of Crockford's base32, most significant first: 130 bits, of which the first two are zero. */
static int parse_session(const char *text, uint8_t session[16]) {
    static const char DIGITS[] = "0123456789abcdefghjkmnpqrstvwxyz";
    unsigned __int128 value = 0;
    if (strlen(text) != 26) {
        return -1;
    }
    for (; *text != '\0'; text++) {
        const char *digit = strchr(DIGITS, *text >= 'A' && *text <= 'Z' ? *text + 32 : *text);
        if (digit == NULL) {
            return -1;
        }
        value = value << 5 | (unsigned)(digit - DIGITS);
    }
    for (int i = 0; i < 16; i++) {
        session[i] = (uint8_t)(value >> (8 * (15 - i)));
    }
    return 0;
}

static int parse(const cJSON *json, struct ticket *ticket) {
    const cJSON *item;
    memset(ticket, 0, sizeof *ticket);
    snprintf(ticket->session_text, sizeof ticket->session_text, "%s", text_of(json, "session"));
    snprintf(ticket->ticket, sizeof ticket->ticket, "%s", text_of(json, "ticket"));
    snprintf(ticket->server_name, sizeof ticket->server_name, "%s", text_of(json, "serverName"));
    ticket->epoch = (uint32_t)cJSON_GetNumberValue(cJSON_GetObjectItemCaseSensitive(json, "epoch"));
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(json, "initialConnectionIds")) {
        const char *text = cJSON_GetStringValue(item);
        size_t n = ticket->connection_ids_count;
        int length = text == NULL || n == ATTEMPTS ? -1 : base64url_decode(text, ticket->connection_ids[n], 20);
        if (length < 8) {
            return -1;
        }
        ticket->connection_id_lengths[n] = (size_t)length;
        ticket->connection_ids_count++;
    }
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(json, "relays")) {
        if (ticket->relays_count < RELAYS) {
            snprintf(ticket->relays[ticket->relays_count++], sizeof *ticket->relays, "%s", text_of(item, "address"));
        }
    }
    int anchor = base64url_decode(text_of(json, "trustAnchor"), ticket->trust_anchor, sizeof ticket->trust_anchor);
    ticket->trust_anchor_length = anchor < 0 ? 0 : (size_t)anchor;
    int complete = ticket->ticket[0] != '\0' && ticket->server_name[0] != '\0' && anchor > 0 &&
                   ticket->connection_ids_count > 0 && ticket->relays_count > 0;
    return complete ? parse_session(ticket->session_text, ticket->session) : -1;
}

int ticket_get(const struct router *router, const uint8_t client_key[32], struct ticket *ticket) {
    char key[64], body[512], request[1024];
    static char answer[65536];
    base64url_encode(client_key, 32, key, sizeof key);
    int length = snprintf(body, sizeof body, "{\"agent\":\"%s\",\"clientKey\":\"%s\",\"codec\":\"opus\"}", router->agent, key);
    if (length < 0 || (size_t)length >= sizeof body) {
        fprintf(stderr, "the agent's name is too long\n");
        return -1;
    }
    length = snprintf(request, sizeof request,
                      "POST /v1/sessions HTTP/1.1\r\nhost: %s\r\nauthorization: Bearer %s\r\n"
                      "content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s",
                      router->name, router->api_key, length, body);
    if (length < 0 || (size_t)length >= sizeof request || exchange(router, request, answer, sizeof answer) <= 0) {
        return -1;
    }
    const char *json_text = strstr(answer, "\r\n\r\n");
    int status = 0;
    if (json_text == NULL || sscanf(answer, "HTTP/1.1 %d", &status) != 1 || status / 100 != 2) {
        fprintf(stderr, "router: %s\n", answer);
        return -1;
    }
    cJSON *json = cJSON_Parse(json_text + 4);
    int parsed = parse(json, ticket);
    cJSON_Delete(json);
    if (parsed != 0) {
        fprintf(stderr, "router: not a ticket: %s\n", json_text + 4);
    }
    return parsed;
}

/* A caller without any code of Antiphon's: ngtcp2 for QUIC, GnuTLS for TLS, cJSON for the ticket.
 *
 *   client ROUTER NAME CA AGENT      with ANTIPHON_API_KEY set
 *
 * It gets a ticket, connects with a connection ID of the ticket, activates the session, sends a heartbeat, waits for
 * one that echoes it, and says goodbye. What it learns it prints, one fact per line.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <gnutls/abstract.h>
#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>
#include <ngtcp2/ngtcp2.h>
#include <ngtcp2/ngtcp2_crypto.h>
#include <ngtcp2/ngtcp2_crypto_gnutls.h>

#include "ticket.h"
#include "wire.h"

enum {
    PACKET = 1200,                /* 1,280 with the tunnel's header, UDP and IPv6 */
    AUDIO_FLOW = 0,
    HEARTBEAT_FLOW = 1,
    ATTEMPT_MS = 4000,
    CALL_MS = 20000,
};

struct call {
    const struct ticket *ticket;
    gnutls_privkey_t key;
    ngtcp2_conn *conn;
    gnutls_session_t tls;
    ngtcp2_crypto_conn_ref ref;
    int fd;
    int64_t stream;
    int handshaken, activated, echoed, failed, finish;
    uint8_t control[8192]; /* all that is said on the control stream: it has to stay until it is acknowledged */
    struct writer said;
    size_t sent;
    uint8_t heard[16384]; /* an incomplete message */
    size_t heard_length;
    uint8_t datagram[64];
    size_t datagram_length; /* 0: none waits */
    uint64_t beat_us;
    uint32_t beats;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int fail(struct call *call, const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    call->failed = 1;
    return NGTCP2_ERR_CALLBACK_FAILURE;
}

static ngtcp2_conn *conn_of(ngtcp2_crypto_conn_ref *ref) {
    return ((struct call *)ref->user_data)->conn;
}

static void random_bytes(uint8_t *to, size_t length, const ngtcp2_rand_ctx *context) {
    (void)context;
    gnutls_rnd(GNUTLS_RND_RANDOM, to, length);
}

static int new_connection_id(ngtcp2_conn *conn, ngtcp2_cid *cid, uint8_t *token, size_t length, void *user) {
    (void)conn, (void)user;
    cid->datalen = length;
    gnutls_rnd(GNUTLS_RND_RANDOM, cid->data, length);
    gnutls_rnd(GNUTLS_RND_RANDOM, token, NGTCP2_STATELESS_RESET_TOKENLEN);
    return 0;
}

/* ClientMessage, preceded by its length. */
static void say(struct call *call, uint32_t number, const struct writer *message) {
    uint8_t bytes[6000];
    struct writer outer = {bytes, 0, sizeof bytes, message->failed};
    put_bytes_field(&outer, number, message->data, message->length);
    put_quic_integer(&call->said, outer.length);
    put_bytes(&call->said, bytes, outer.length);
    call->said.failed |= outer.failed;
}

static int activate(struct call *call) {
    static const char PREFIX[] = "antiphon/1 activate", LABEL[] = "EXPORTER-antiphon-1-activate";
    const struct ticket *ticket = call->ticket;
    uint8_t exported[32], signed_bytes[128], bytes[5000];
    int error = gnutls_prf_rfc5705(call->tls, strlen(LABEL), LABEL, 0, "", sizeof exported, (char *)exported);
    if (error != 0) {
        return fail(call, "TLS exporter", gnutls_strerror(error));
    }
    struct writer proof = {signed_bytes, 0, sizeof signed_bytes, 0};
    uint8_t epoch[4] = {(uint8_t)(ticket->epoch >> 24), (uint8_t)(ticket->epoch >> 16), (uint8_t)(ticket->epoch >> 8),
                        (uint8_t)ticket->epoch};
    put_bytes(&proof, PREFIX, strlen(PREFIX));
    put_bytes(&proof, exported, sizeof exported);
    put_bytes(&proof, ticket->session, sizeof ticket->session);
    put_bytes(&proof, epoch, sizeof epoch);
    gnutls_datum_t signature, data = {signed_bytes, (unsigned)proof.length};
    error = gnutls_privkey_sign_data2(call->key, GNUTLS_SIGN_EDDSA_ED25519, 0, &data, &signature);
    if (error != 0) {
        return fail(call, "signature", gnutls_strerror(error));
    }
    struct writer message = {bytes, 0, sizeof bytes, 0};
    put_bytes_field(&message, 1, ticket->session, sizeof ticket->session);
    put_varint_field(&message, 2, ticket->epoch);
    put_bytes_field(&message, 3, ticket->ticket, strlen(ticket->ticket));
    put_bytes_field(&message, 4, signature.data, signature.size);
    gnutls_free(signature.data);
    say(call, 1, &message);
    return 0;
}

static void heartbeat(struct call *call) {
    uint8_t bytes[48];
    struct writer message = {bytes, 0, sizeof bytes, 0}, datagram = {call->datagram, 0, sizeof call->datagram, 0};
    call->beat_us = now_ns() / 1000;
    put_varint_field(&message, 1, call->ticket->epoch);
    put_varint_field(&message, 2, ++call->beats);
    put_fixed64_field(&message, 3, call->beat_us);
    put_quic_integer(&datagram, HEARTBEAT_FLOW);
    put_bytes(&datagram, bytes, message.length);
    call->datagram_length = datagram.length;
}

static int on_handshake(ngtcp2_conn *conn, void *user) {
    struct call *call = user;
    gnutls_datum_t alpn = {0};
    gnutls_alpn_get_selected_protocol(call->tls, &alpn);
    printf("connected version=%u alpn=%.*s\n", ngtcp2_conn_get_negotiated_version(conn), (int)alpn.size, alpn.data);
    call->handshaken = 1;
    int error = ngtcp2_conn_open_bidi_stream(conn, &call->stream, NULL);
    return error != 0 ? fail(call, "control stream", ngtcp2_strerror(error)) : activate(call);
}

/* One ServerMessage. */
static int on_message(struct call *call, struct reader message) {
    struct field outer, inner;
    uint64_t values[8] = {0};
    while (take_field(&message, &outer)) {
        struct reader fields = outer.bytes;
        while (take_field(&fields, &inner)) {
            if (inner.number < 8) {
                values[inner.number] = inner.value;
            }
            if (outer.number == 2 && inner.number == 2) {
                fprintf(stderr, "refused: %.*s\n", (int)inner.bytes.length, (const char *)inner.bytes.data);
            }
        }
        if (fields.failed || outer.number == 2 || outer.number == 9) {
            return fail(call, "control stream", outer.number == 1 ? "damaged" : "the worker ended the session");
        }
        if (outer.number == 1) {
            call->activated = 1;
            printf("activated codec=%llu audio_flow=%llu heartbeat_flow=%llu heartbeat_interval_ms=%llu "
                   "longest_session_s=%llu\n",
                   (unsigned long long)values[1], (unsigned long long)values[2], (unsigned long long)values[3],
                   (unsigned long long)values[4], (unsigned long long)values[6]);
            heartbeat(call);
        }
    }
    return message.failed ? fail(call, "control stream", "not protobuf") : 0;
}

static int on_stream_data(ngtcp2_conn *conn, uint32_t flags, int64_t stream, uint64_t offset, const uint8_t *data,
                          size_t length, void *user, void *stream_user) {
    struct call *call = user;
    (void)flags, (void)offset, (void)stream_user;
    if (stream != call->stream || length > sizeof call->heard - call->heard_length) {
        return fail(call, "control stream", "a stream or message that nobody announced");
    }
    memcpy(call->heard + call->heard_length, data, length);
    call->heard_length += length;
    ngtcp2_conn_extend_max_stream_offset(conn, stream, length);
    ngtcp2_conn_extend_max_offset(conn, length);
    for (;;) {
        struct reader from = {call->heard, call->heard_length, 0};
        uint64_t size = take_quic_integer(&from);
        if (from.failed || size > from.length) {
            return 0;
        }
        struct reader message = {from.data, (size_t)size, 0};
        if (on_message(call, message) != 0) {
            return NGTCP2_ERR_CALLBACK_FAILURE;
        }
        size_t taken = (size_t)(from.data - call->heard) + (size_t)size;
        call->heard_length -= taken;
        memmove(call->heard, call->heard + taken, call->heard_length);
    }
}

static int on_datagram(ngtcp2_conn *conn, uint32_t flags, const uint8_t *data, size_t length, void *user) {
    struct call *call = user;
    struct reader from = {data, length, 0};
    uint64_t flow = take_quic_integer(&from), values[8] = {0};
    struct field field;
    (void)conn, (void)flags;
    if (from.failed || flow != HEARTBEAT_FLOW) {
        return 0; /* audio, or what a newer worker says */
    }
    while (take_field(&from, &field)) {
        if (field.number < 8) {
            values[field.number] = field.value;
        }
    }
    if (from.failed) {
        return fail(call, "heartbeat", "not protobuf");
    }
    if (call->beats > 0 && values[4] == call->beat_us && !call->echoed) {
        call->echoed = 1;
        printf("heartbeat epoch=%llu echoed=yes\n", (unsigned long long)values[1]);
    }
    return 0;
}

static int write_packets(struct call *call) {
    uint8_t packet[PACKET];
    for (;;) {
        ngtcp2_path_storage path;
        ngtcp2_pkt_info info;
        ngtcp2_ssize length, taken = -1;
        int accepted = 0;
        ngtcp2_path_storage_zero(&path);
        if (call->datagram_length > 0) {
            ngtcp2_vec vec = {call->datagram, call->datagram_length};
            length = ngtcp2_conn_writev_datagram(call->conn, &path.path, &info, packet, sizeof packet, &accepted,
                                                 NGTCP2_WRITE_DATAGRAM_FLAG_NONE, 0, &vec, 1, now_ns());
            if (accepted) {
                call->datagram_length = 0;
            }
        } else {
            ngtcp2_vec vec = {call->control + call->sent, call->said.length - call->sent};
            int speak = vec.len > 0 || call->finish == 1;
            uint32_t flags = call->finish == 1 ? NGTCP2_WRITE_STREAM_FLAG_FIN : NGTCP2_WRITE_STREAM_FLAG_NONE;
            length = ngtcp2_conn_writev_stream(call->conn, &path.path, &info, packet, sizeof packet, &taken, flags,
                                               speak ? call->stream : -1, &vec, speak ? 1 : 0, now_ns());
            if (taken >= 0) {
                call->sent += (size_t)taken;
                call->finish += call->finish == 1 && call->sent == call->said.length;
            }
        }
        if (length < 0) {
            return fail(call, "QUIC", ngtcp2_strerror((int)length));
        }
        if (length == 0) {
            ngtcp2_conn_update_pkt_tx_time(call->conn, now_ns());
            return 0;
        }
        if (send(call->fd, packet, (size_t)length, 0) < 0 && errno != ECONNREFUSED) {
            return fail(call, "UDP", strerror(errno));
        }
    }
}

/* Carries packets until `done` is set or the time is up; 0 if it was set. */
static int run_until(struct call *call, const int *done, int within_ms) {
    uint64_t deadline = now_ns() + (uint64_t)within_ms * 1000000u;
    while (!*done && !call->failed) {
        if (write_packets(call) != 0) {
            return -1;
        }
        uint64_t now = now_ns(), expiry = ngtcp2_conn_get_expiry(call->conn);
        if (now >= deadline) {
            return -1;
        }
        uint64_t wake = expiry < deadline ? expiry : deadline;
        struct pollfd waited = {call->fd, POLLIN, 0};
        poll(&waited, 1, wake <= now ? 0 : (int)((wake - now) / 1000000u) + 1);
        uint8_t packet[65536];
        ssize_t length;
        while (!*done && (length = recv(call->fd, packet, sizeof packet, MSG_DONTWAIT)) >= 0) {
            ngtcp2_path path = *ngtcp2_conn_get_path(call->conn);
            ngtcp2_pkt_info info = {0};
            int error = ngtcp2_conn_read_pkt(call->conn, &path, &info, packet, (size_t)length, now_ns());
            if (error != 0) {
                return fail(call, "QUIC", ngtcp2_strerror(error));
            }
        }
        if (ngtcp2_conn_get_expiry(call->conn) <= now_ns()) {
            int error = ngtcp2_conn_handle_expiry(call->conn, now_ns());
            if (error != 0) {
                return fail(call, "QUIC", ngtcp2_strerror(error));
            }
        }
    }
    return call->failed ? -1 : 0;
}

static int set_up_tls(struct call *call, gnutls_certificate_credentials_t trust) {
    static const char PRIORITY[] = "NORMAL:-VERS-ALL:+VERS-TLS1.3:%DISABLE_TLS13_COMPAT_MODE";
    const gnutls_datum_t alpn = {(unsigned char *)"antiphon/1", 10};
    const char *name = call->ticket->server_name;
    gnutls_init(&call->tls, GNUTLS_CLIENT | GNUTLS_ENABLE_EARLY_DATA | GNUTLS_NO_END_OF_EARLY_DATA);
    gnutls_credentials_set(call->tls, GNUTLS_CRD_CERTIFICATE, trust);
    gnutls_server_name_set(call->tls, GNUTLS_NAME_DNS, name, strlen(name));
    gnutls_session_set_verify_cert(call->tls, name, 0);
    call->ref.get_conn = conn_of;
    call->ref.user_data = call;
    gnutls_session_set_ptr(call->tls, &call->ref);
    if (gnutls_priority_set_direct(call->tls, PRIORITY, NULL) != 0 ||
        ngtcp2_crypto_gnutls_configure_client_session(call->tls) != 0 ||
        gnutls_alpn_set_protocols(call->tls, &alpn, 1, GNUTLS_ALPN_MANDATORY) != 0) {
        return fail(call, "TLS", "cannot be set up");
    }
    return 0;
}

static int set_up_quic(struct call *call, size_t attempt) {
    ngtcp2_callbacks callbacks = {
        .client_initial = ngtcp2_crypto_client_initial_cb,
        .recv_crypto_data = ngtcp2_crypto_recv_crypto_data_cb,
        .handshake_completed = on_handshake,
        .encrypt = ngtcp2_crypto_encrypt_cb,
        .decrypt = ngtcp2_crypto_decrypt_cb,
        .hp_mask = ngtcp2_crypto_hp_mask_cb,
        .recv_stream_data = on_stream_data,
        .recv_retry = ngtcp2_crypto_recv_retry_cb,
        .rand = random_bytes,
        .get_new_connection_id = new_connection_id,
        .update_key = ngtcp2_crypto_update_key_cb,
        .delete_crypto_aead_ctx = ngtcp2_crypto_delete_crypto_aead_ctx_cb,
        .delete_crypto_cipher_ctx = ngtcp2_crypto_delete_crypto_cipher_ctx_cb,
        .recv_datagram = on_datagram,
        .get_path_challenge_data = ngtcp2_crypto_get_path_challenge_data_cb,
        .version_negotiation = ngtcp2_crypto_version_negotiation_cb,
    };
    const struct ticket *ticket = call->ticket;
    struct sockaddr_storage local, remote;
    socklen_t local_length = sizeof local, remote_length = sizeof remote;
    getsockname(call->fd, (struct sockaddr *)&local, &local_length);
    getpeername(call->fd, (struct sockaddr *)&remote, &remote_length);
    ngtcp2_path path = {{(struct sockaddr *)&local, local_length}, {(struct sockaddr *)&remote, remote_length}, NULL};
    ngtcp2_cid destination, source;
    uint8_t own[8];
    gnutls_rnd(GNUTLS_RND_RANDOM, own, sizeof own);
    /* The one thing that Antiphon asks of a QUIC client: the ticket's connection ID is the first destination. */
    ngtcp2_cid_init(&destination, ticket->connection_ids[attempt], ticket->connection_id_lengths[attempt]);
    ngtcp2_cid_init(&source, own, sizeof own);
    ngtcp2_settings settings;
    ngtcp2_transport_params params;
    ngtcp2_settings_default(&settings);
    settings.initial_ts = now_ns();
    settings.max_tx_udp_payload_size = PACKET;
    settings.no_tx_udp_payload_size_shaping = 1;
    ngtcp2_transport_params_default(&params);
    params.initial_max_data = 1 << 20;
    params.initial_max_stream_data_bidi_local = 1 << 16;
    params.max_idle_timeout = 30 * NGTCP2_SECONDS;
    params.max_datagram_frame_size = 65535;
    params.active_connection_id_limit = 4;
    int error = ngtcp2_conn_client_new(&call->conn, &destination, &source, &path, NGTCP2_PROTO_VER_V1, &callbacks,
                                       &settings, &params, NULL, call);
    if (error != 0) {
        return fail(call, "QUIC", ngtcp2_strerror(error));
    }
    ngtcp2_conn_set_tls_native_handle(call->conn, call->tls);
    return 0;
}

static void hang_up(struct call *call) {
    uint8_t packet[PACKET];
    ngtcp2_connection_close_error none;
    ngtcp2_path_storage path;
    ngtcp2_pkt_info info;
    ngtcp2_path_storage_zero(&path);
    ngtcp2_connection_close_error_default(&none);
    ngtcp2_connection_close_error_set_application_error(&none, 0, NULL, 0);
    ngtcp2_ssize length =
        ngtcp2_conn_write_connection_close(call->conn, &path.path, &info, packet, sizeof packet, &none, now_ns());
    if (length > 0) {
        (void)!send(call->fd, packet, (size_t)length, 0);
    }
}

/* One attempt through one relay: 0 if all went well, 1 if nobody answered, -1 if it went wrong. */
static int attempt(const struct ticket *ticket, gnutls_privkey_t key, gnutls_certificate_credentials_t trust, size_t n) {
    struct call call = {.ticket = ticket, .key = key, .stream = -1};
    struct writer said = {call.control, 0, sizeof call.control, 0};
    const char *relay = ticket->relays[n % ticket->relays_count];
    int outcome = -1, goodbye_sent = 0;
    call.said = said;
    call.fd = connect_to(relay, SOCK_DGRAM);
    if (call.fd < 0 || set_up_tls(&call, trust) != 0 || set_up_quic(&call, n) != 0) {
        goto done;
    }
    if (run_until(&call, &call.handshaken, ATTEMPT_MS) != 0) {
        outcome = call.failed ? -1 : 1;
        goto done;
    }
    if (run_until(&call, &call.activated, CALL_MS) != 0) {
        fprintf(stderr, "the worker did not activate the session\n");
        goto done;
    }
    for (int beats = 0; !call.echoed && !call.failed && beats < CALL_MS / 100; beats++) {
        run_until(&call, &call.echoed, 100);
        if (!call.echoed) {
            heartbeat(&call); /* datagrams may be lost */
        }
    }
    if (!call.echoed) {
        fprintf(stderr, "no heartbeat came back\n");
        goto done;
    }
    struct writer goodbye = {NULL, 0, 0, 0};
    say(&call, 3, &goodbye);
    call.finish = 1;
    run_until(&call, &goodbye_sent, 200);
    hang_up(&call);
    printf("goodbye relay=%s\n", relay);
    outcome = 0;
done:
    ngtcp2_conn_del(call.conn);
    if (call.tls != NULL) {
        gnutls_deinit(call.tls);
    }
    if (call.fd >= 0) {
        close(call.fd);
    }
    return outcome;
}

int main(int count, char **arguments) {
    const char *api_key = getenv("ANTIPHON_API_KEY");
    if (count != 5 || api_key == NULL) {
        fprintf(stderr, "usage: ANTIPHON_API_KEY=ak_... %s ROUTER NAME CA AGENT\n", arguments[0]);
        return 2;
    }
    struct router router = {arguments[1], arguments[2], arguments[3], api_key, arguments[4]};
    static struct ticket ticket;
    gnutls_privkey_t key;
    gnutls_ecc_curve_t curve;
    gnutls_datum_t public_key = {0}, none = {0};
    gnutls_certificate_credentials_t trust;
    setvbuf(stdout, NULL, _IOLBF, 0);
    gnutls_privkey_init(&key);
    if (gnutls_privkey_generate(key, GNUTLS_PK_EDDSA_ED25519, 0, 0) != 0 ||
        gnutls_privkey_export_ecc_raw(key, &curve, &public_key, &none, NULL) != 0 || public_key.size != 32) {
        fprintf(stderr, "GnuTLS makes no Ed25519 key\n");
        return 1;
    }
    if (ticket_get(&router, public_key.data, &ticket) != 0) {
        return 1;
    }
    printf("ticket session=%s epoch=%u server=%s\n", ticket.session_text, ticket.epoch, ticket.server_name);
    const gnutls_datum_t anchor = {ticket.trust_anchor, (unsigned)ticket.trust_anchor_length};
    gnutls_certificate_allocate_credentials(&trust);
    if (gnutls_certificate_set_x509_trust_mem(trust, &anchor, GNUTLS_X509_FMT_DER) < 1) {
        fprintf(stderr, "the ticket's trust anchor is no certificate\n");
        return 1;
    }
    int outcome = 1;
    for (size_t n = 0; n < ticket.connection_ids_count && outcome == 1; n++) {
        outcome = attempt(&ticket, key, trust, n);
    }
    if (outcome == 1) {
        fprintf(stderr, "no answer through any relay\n");
    }
    gnutls_certificate_free_credentials(trust);
    gnutls_privkey_deinit(key);
    gnutls_free(public_key.data);
    return outcome != 0;
}

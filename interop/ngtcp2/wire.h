/* Forms that travel: base64url, QUIC's integers, protobuf. */
#ifndef ANTIPHON_WIRE_H
#define ANTIPHON_WIRE_H

#include <stddef.h>
#include <stdint.h>

/* Bytes that are being written, up to a bound; `failed` once something did not fit. */
struct writer {
    uint8_t *data;
    size_t length, capacity;
    int failed;
};

/* Bytes that are being read; `failed` once something was missing. */
struct reader {
    const uint8_t *data;
    size_t length;
    int failed;
};

/* One field of a protobuf message. */
struct field {
    uint32_t number;
    uint64_t value;      /* of a varint or fixed64 */
    struct reader bytes; /* of a string, bytes or message */
};

/* RFC 4648, section 5, without padding. The text's length, or -1. */
int base64url_encode(const uint8_t *data, size_t length, char *text, size_t capacity);
/* The number of bytes, or -1. */
int base64url_decode(const char *text, uint8_t *data, size_t capacity);

void put_bytes(struct writer *to, const void *data, size_t length);
/* RFC 9000, section 16. */
void put_quic_integer(struct writer *to, uint64_t value);
void put_varint_field(struct writer *to, uint32_t number, uint64_t value);
void put_fixed64_field(struct writer *to, uint32_t number, uint64_t value);
void put_bytes_field(struct writer *to, uint32_t number, const void *data, size_t length);

uint64_t take_quic_integer(struct reader *from);
/* The next field; 0 at the end and when the message is damaged. */
int take_field(struct reader *from, struct field *field);

#endif

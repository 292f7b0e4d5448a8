#include "wire.h"

#include <string.h>

static const char DIGITS[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

int base64url_encode(const uint8_t *data, size_t length, char *text, size_t capacity) {
    size_t out = 0;
    uint32_t bits = 0;
    int pending = 0;
    if (capacity <= (length * 4 + 2) / 3) {
        return -1;
    }
    for (size_t i = 0; i < length; i++) {
        bits = bits << 8 | data[i];
        for (pending += 8; pending >= 6; pending -= 6) {
            text[out++] = DIGITS[bits >> (pending - 6) & 63];
        }
    }
    if (pending > 0) {
        text[out++] = DIGITS[bits << (6 - pending) & 63];
    }
    text[out] = '\0';
    return (int)out;
}

int base64url_decode(const char *text, uint8_t *data, size_t capacity) {
    size_t out = 0;
    uint32_t bits = 0;
    int pending = 0;
    for (; *text != '\0'; text++) {
        const char *digit = strchr(DIGITS, *text);
        if (digit == NULL) {
            return -1;
        }
        bits = bits << 6 | (uint32_t)(digit - DIGITS);
        pending += 6;
        if (pending >= 8) {
            pending -= 8;
            if (out == capacity) {
                return -1;
            }
            data[out++] = (uint8_t)(bits >> pending);
        }
    }
    return (int)out;
}

void put_bytes(struct writer *to, const void *data, size_t length) {
    if (to->failed || to->capacity - to->length < length) {
        to->failed = 1;
        return;
    }
    memcpy(to->data + to->length, data, length);
    to->length += length;
}

static void put_big_endian(struct writer *to, uint64_t value, int bytes) {
    for (int i = bytes - 1; i >= 0; i--) {
        uint8_t byte = (uint8_t)(value >> (8 * i));
        put_bytes(to, &byte, 1);
    }
}

void put_quic_integer(struct writer *to, uint64_t value) {
    if (value < 1u << 6) {
        put_big_endian(to, value, 1);
    } else if (value < 1u << 14) {
        put_big_endian(to, value | 1u << 14, 2);
    } else if (value < 1u << 30) {
        put_big_endian(to, value | 2u << 30, 4);
    } else {
        put_big_endian(to, value | UINT64_C(3) << 62, 8);
    }
}

static void put_varint(struct writer *to, uint64_t value) {
    for (; value >= 128; value >>= 7) {
        uint8_t byte = (uint8_t)(value | 128);
        put_bytes(to, &byte, 1);
    }
    uint8_t last = (uint8_t)value;
    put_bytes(to, &last, 1);
}

void put_varint_field(struct writer *to, uint32_t number, uint64_t value) {
    put_varint(to, number << 3);
    put_varint(to, value);
}

void put_fixed64_field(struct writer *to, uint32_t number, uint64_t value) {
    put_varint(to, number << 3 | 1);
    for (int i = 0; i < 8; i++) {
        uint8_t byte = (uint8_t)(value >> (8 * i));
        put_bytes(to, &byte, 1);
    }
}

void put_bytes_field(struct writer *to, uint32_t number, const void *data, size_t length) {
    put_varint(to, number << 3 | 2);
    put_varint(to, length);
    put_bytes(to, data, length);
}

static uint8_t take_byte(struct reader *from) {
    if (from->length == 0) {
        from->failed = 1;
        return 0;
    }
    from->length--;
    return *from->data++;
}

uint64_t take_quic_integer(struct reader *from) {
    uint8_t first = take_byte(from);
    uint64_t value = first & 63;
    for (int more = (1 << (first >> 6)) - 1; more > 0; more--) {
        value = value << 8 | take_byte(from);
    }
    return value;
}

static uint64_t take_varint(struct reader *from) {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        uint8_t byte = take_byte(from);
        value |= (uint64_t)(byte & 127) << shift;
        if (byte < 128) {
            return value;
        }
    }
    from->failed = 1;
    return 0;
}

int take_field(struct reader *from, struct field *field) {
    if (from->failed || from->length == 0) {
        return 0;
    }
    uint64_t tag = take_varint(from);
    size_t skipped = 0;
    memset(field, 0, sizeof *field);
    field->number = (uint32_t)(tag >> 3);
    switch (tag & 7) {
    case 0:
        field->value = take_varint(from);
        break;
    case 1:
        for (int i = 0; i < 8; i++) {
            field->value |= (uint64_t)take_byte(from) << (8 * i);
        }
        break;
    case 2:
        skipped = (size_t)take_varint(from);
        break;
    case 5:
        skipped = 4;
        break;
    default:
        from->failed = 1;
    }
    if (skipped > from->length) {
        from->failed = 1;
    }
    if (from->failed) {
        return 0;
    }
    field->bytes.data = from->data;
    field->bytes.length = skipped;
    from->data += skipped;
    from->length -= skipped;
    return 1;
}

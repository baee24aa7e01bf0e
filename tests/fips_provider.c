/* A stand-in for OpenSSL's FIPS provider, for hosts that have none: what the system's libcrypto can do, declared as
 * `fips=yes`, without ChaCha20-Poly1305 and Argon2, which no FIPS provider has.
 *
 * Nothing in it is validated; it makes the OpenSSL that loads it refuse what it would refuse with the real module.
 * The declarations are those of openssl-core.h(7), provider(7) and OSSL_PROVIDER(3), so that no headers are needed.
 *
 * Build: cc -shared -fPIC -o fips.so fips_provider.c -l:libcrypto.so.3
 */

#include <stdlib.h>
#include <string.h>

typedef struct {
    int function_id;
    void (*function)(void);
} Dispatch;

typedef struct {
    const char *names;
    const char *properties;
    const Dispatch *implementation;
    const char *description;
} Algorithm;

enum { QUERY_OPERATION = 1027, OPERATIONS = 32 };

extern void *OSSL_LIB_CTX_new(void);
extern void *OSSL_PROVIDER_load(void *context, const char *name);
extern void *OSSL_PROVIDER_get0_provider_ctx(const void *provider);
extern const Algorithm *OSSL_PROVIDER_query_operation(const void *provider, int operation, int *no_cache);

static void *behind; /* the default provider of the system's libcrypto, in a context of its own */
static Algorithm *offered[OPERATIONS];

static int is_refused(const char *names) { return strstr(names, "ChaCha20") != NULL || strstr(names, "ARGON2") != NULL; }

static const Algorithm *query(void *context, int operation, int *no_cache)
{
    const Algorithm *all = OSSL_PROVIDER_query_operation(behind, operation, no_cache);
    size_t count = 0, kept = 0;

    (void)context;
    if (all == NULL || operation < 0 || operation >= OPERATIONS)
        return NULL;
    if (offered[operation] != NULL)
        return offered[operation];
    while (all[count].names != NULL)
        count++;
    if ((offered[operation] = calloc(count + 1, sizeof(Algorithm))) == NULL)
        return NULL;
    for (size_t i = 0; i < count; i++) {
        if (is_refused(all[i].names))
            continue;
        offered[operation][kept] = all[i];
        offered[operation][kept++].properties = "provider=stand-in,fips=yes";
    }
    return offered[operation];
}

static const Dispatch functions[] = {{QUERY_OPERATION, (void (*)(void))query}, {0, NULL}};

int OSSL_provider_init(const void *core, const Dispatch *from_core, const Dispatch **out, void **context)
{
    (void)core;
    (void)from_core;
    if ((behind = OSSL_PROVIDER_load(OSSL_LIB_CTX_new(), "default")) == NULL)
        return 0;
    *context = OSSL_PROVIDER_get0_provider_ctx(behind);
    *out = functions;
    return 1;
}

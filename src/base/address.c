/*-------------------------------------------------------------------------
 *
 * address.c
 *	  Which network addresses we may send requests to.
 *
 * Asked for each address before a socket is opened, after the name was looked
 * up: so it does not matter how an address was spelled, or that a name has
 * another address now than when it was checked.  Called from callbacks of
 * libcurl, therefore without palloc and ereport.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include "base/address.h"
#include "base/guc.h"

/* No list opens these: metadata services of clouds hand out credentials. */
static const char *const never[] = {
	"169.254.0.0/16",			/* link-local, with most metadata services */
	"100.100.100.200/32",		/* metadata of Alibaba */
	"168.63.129.16/32",			/* platform address of Azure */
	"192.0.0.192/32",			/* metadata of Oracle */
	"fe80::/10",
	"fd00:ec2::/32",			/* metadata of Amazon */
	"fd20:ce::/32",				/* metadata of Google */
};

/* Not of the public network; a list of the platform's may open them. */
static const char *const not_public[] = {
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
	"192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
	"::/64",					/* none, loopback, and IPv4 in old forms */
	"64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "3fff::/20", "5f00::/16", "fc00::/7", "fec0::/10", "ff00::/8",
};

/* IPv6 addresses that stand for one of IPv4, and where in them it is. */
static const struct
{
	const char *range;
	int			offset;
}			embedded[] = {
	{"::ffff:0:0/96", 12},
	{"64:ff9b::/96", 12},
	{"2002::/16", 2},
};

/* The same, read once. */
static RedriveAddressRange never_ranges[lengthof(never)];
static RedriveAddressRange not_public_ranges[lengthof(not_public)];
static RedriveAddressRange embedded_ranges[lengthof(embedded)];

static bool
in_range(int family, const unsigned char *address, const RedriveAddressRange *range)
{
	int			bytes = range->bits / 8;
	int			rest = range->bits % 8;

	if (family != range->family || memcmp(address, range->address, bytes) != 0)
		return false;
	return rest == 0 || ((address[bytes] ^ range->address[bytes]) & (0xff << (8 - rest)) & 0xff) == 0;
}

static bool
in_list(int family, const unsigned char *address, const RedriveAddressRange *list, int n)
{
	for (int i = 0; i < n; i++)
		if (in_range(family, address, &list[i]))
			return true;
	return false;
}

/*
 * Set a range from text like 10.0.0.0/8; without a slash it is one address.
 * Returns false, and ereports nothing, when it is none.
 */
bool
redrive_parse_range(const char *text, RedriveAddressRange *range)
{
	char		address[INET6_ADDRSTRLEN];
	const char *slash = strchr(text, '/');
	size_t		length = slash != NULL ? (size_t) (slash - text) : strlen(text);
	int			most;
	char	   *end;

	if (length == 0 || length >= sizeof(address))
		return false;
	memset(range, 0, sizeof(RedriveAddressRange));
	memcpy(address, text, length);
	address[length] = '\0';
	range->family = strchr(address, ':') != NULL ? AF_INET6 : AF_INET;
	most = range->family == AF_INET6 ? 128 : 32;
	if (inet_pton(range->family, address, range->address) != 1)
		return false;
	range->bits = most;
	if (slash != NULL)
	{
		long		bits = strtol(slash + 1, &end, 10);

		if (slash[1] < '0' || slash[1] > '9' || *end != '\0' || bits > most)
			return false;
		range->bits = (int) bits;
	}
	return true;
}

/* Read our lists when they are needed first; false when one is wrong. */
static bool
read_lists(void)
{
	static bool done = false;

	if (done)
		return true;
	for (int i = 0; i < lengthof(never); i++)
		if (!redrive_parse_range(never[i], &never_ranges[i]))
			return false;
	for (int i = 0; i < lengthof(not_public); i++)
		if (!redrive_parse_range(not_public[i], &not_public_ranges[i]))
			return false;
	for (int i = 0; i < lengthof(embedded); i++)
		if (!redrive_parse_range(embedded[i].range, &embedded_ranges[i]))
			return false;
	return done = true;
}

/*
 * May we open a connection to this address?
 *
 * allow lists ranges that are open although they are not public, on all ports;
 * allow_only: nothing else is.  What we do not know is refused.
 */
RedriveVerdict
redrive_judge_address(const struct sockaddr *sockaddr, const RedriveAddressRange *allow, int n_allow, bool allow_only)
{
	int			family = sockaddr->sa_family;
	const unsigned char *address;
	int			port;

	if (!read_lists())
		return VERDICT_REFUSED;
	if (family == AF_INET)
	{
		address = (const unsigned char *) &((const struct sockaddr_in *) sockaddr)->sin_addr;
		port = ntohs(((const struct sockaddr_in *) sockaddr)->sin_port);
	}
	else if (family == AF_INET6)
	{
		address = (const unsigned char *) &((const struct sockaddr_in6 *) sockaddr)->sin6_addr;
		port = ntohs(((const struct sockaddr_in6 *) sockaddr)->sin6_port);
	}
	else
		return VERDICT_REFUSED;
	for (int i = 0; i < lengthof(embedded) && family == AF_INET6; i++)
		if (in_range(family, address, &embedded_ranges[i]))
		{
			family = AF_INET;
			address += embedded[i].offset;
		}
	if (in_list(family, address, never_ranges, lengthof(never)))
		return VERDICT_REFUSED;
	if (in_list(family, address, allow, n_allow))
		return VERDICT_ALLOWED;
	if (in_list(family, address, not_public_ranges, lengthof(not_public)))
		return VERDICT_REFUSED;
	if (allow_only)
		return VERDICT_HTTP_REFUSED;
	return redrive_port_listed(port) ? VERDICT_ALLOWED : VERDICT_PORT_REFUSED;
}

/* The same for an address as text, in its usual form. */
RedriveVerdict
redrive_judge_address_text(const char *address, int port, const RedriveAddressRange *allow, int n_allow, bool allow_only)
{
	struct sockaddr_in v4 = {.sin_family = AF_INET,.sin_port = htons(port)};
	struct sockaddr_in6 v6 = {.sin6_family = AF_INET6,.sin6_port = htons(port)};

	if (inet_pton(AF_INET, address, &v4.sin_addr) == 1)
		return redrive_judge_address((struct sockaddr *) &v4, allow, n_allow, allow_only);
	if (inet_pton(AF_INET6, address, &v6.sin6_addr) == 1)
		return redrive_judge_address((struct sockaddr *) &v6, allow, n_allow, allow_only);
	return VERDICT_REFUSED;
}

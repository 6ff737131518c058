/*-------------------------------------------------------------------------
 *
 * address.h
 *	  Which network addresses we may send requests to.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_ADDRESS_H
#define REDRIVE_ADDRESS_H

#include "postgres.h"

#include <sys/socket.h>

/* A range of addresses. */
typedef struct RedriveAddressRange
{
	int			family;			/* AF_INET or AF_INET6 */
	int			bits;			/* length of the prefix */
	unsigned char address[16];	/* in network order, 4 or 16 bytes of it */
} RedriveAddressRange;

typedef enum RedriveVerdict
{
	VERDICT_REFUSED,			/* the address */
	VERDICT_HTTP_REFUSED,		/* not the address, but that there is no TLS */
	VERDICT_PORT_REFUSED,		/* not the address, but the port */
	VERDICT_ALLOWED
} RedriveVerdict;

extern RedriveVerdict redrive_judge_address(const struct sockaddr *address, const RedriveAddressRange *allow, int n_allow, bool allow_only);
extern RedriveVerdict redrive_judge_address_text(const char *address, int port, const RedriveAddressRange *allow, int n_allow, bool allow_only);
extern bool redrive_parse_range(const char *text, RedriveAddressRange *range);

#endif							/* REDRIVE_ADDRESS_H */

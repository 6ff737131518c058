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

extern bool redrive_address_allowed(const struct sockaddr *address, const RedriveAddressRange *allow, int n_allow, bool allow_only);
extern bool redrive_address_allowed_text(const char *address, const RedriveAddressRange *allow, int n_allow, bool allow_only);
extern bool redrive_parse_range(const char *text, RedriveAddressRange *range);

#endif							/* REDRIVE_ADDRESS_H */
